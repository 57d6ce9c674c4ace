#!/usr/bin/env bash
# Edits clips of a tiny world with the weights of the repository, then takes the whole road there: clips → features → training
# → conversion → generated videos → scores. Needs no GPU and no download; the first clip takes seconds, the whole about four
# minutes on two CPU cores. Every step is the command that serves the big models; only the files of examples/vace/tiny are
# small. You can interrupt it and run it again. It writes to outputs/quickstart.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh
source examples/vace/numbers.sh
active=${VIRTUAL_ENV-}
environment_ready

TINY=examples/vace/tiny
OUT=outputs/quickstart
RANKS=${NPUS_PER_NODE:-2}       # processes that extract, train and generate
ITERATIONS=${TRAIN_ITERS:-360}  # of training
CLIPS=${CLIPS:-25}              # scenes to train on, of each kind; of inpainting four times as many
SCENES=${SCENES:-2}             # held-out scenes of each kind to generate from
for name in RANKS ITERATIONS CLIPS SCENES; do whole "$name" 1; done
STEPS=7
STARTED=$SECONDS
export MINDSPEED_MM_DEVICE=${MINDSPEED_MM_DEVICE:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$OUT/logs"
number=0
clear=
if [[ -t 1 ]]; then # progress bars are drawn on the terminal; a line takes the place of the bar
    clear=$'\r\e[K'
    export MINDSPEED_MM_TERMINAL=${MINDSPEED_MM_TERMINAL-$(tty <&1)}
fi

# step TITLE: what comes now.
step() {
    number=$((number + 1))
    printf '\n[%d/%d] %s\n' "$number" "$STEPS" "$1"
}

# say TEXT: a line with the seconds since the start.
say() {
    printf '%s%5d s | %s\n' "$clear" $((SECONDS - STARTED)) "$1"
}

# show PATTERN: of the lines on stdin, those that match, as they come; of these the groups of the pattern, where it has some.
show() {
    local line
    while IFS= read -r line; do
        if [[ $line =~ $1 ]]; then
            if ((${#BASH_REMATCH[@]} > 1)); then line=${BASH_REMATCH[*]:1}; fi
            say "${line:0:200}"
        fi
    done
}

# run PATTERN COMMAND...: prints the command, runs it, prints the matching lines of its output; all of it is in a log file.
run() {
    local pattern=$1 log=$OUT/logs/$number.log
    shift
    printf '        $ %s\n' "$*"
    if ! "$@" 2>&1 | tee "$log" | show "$pattern"; then
        printf '        failed; the end of %s:\n' "$log"
        tail -n 25 "$log" | sed 's/^/        | /'
        exit 1
    fi
}

# generate JSON FOLDER [FLAG...]: every process makes videos of its own.
generate() {
    local json=$1 folder=$2
    shift 2
    run '^ +([^ ]+\.mp4) \(' vace generate $OUT/heldout/"$json" --output-path $OUT/"$folder" \
        --nproc "$RANKS" --data-parallel --log-dir $OUT/logs "$@"
}

step "Edit held-out clips with the shipped weights: another colour, another picture; then the clips as they were"
run . python $TINY/heldout.py $OUT/heldout --base $TINY/inference.json --count "$SCENES"
generate all.json shipped
run . python $TINY/compare.py $OUT/heldout $OUT/edited.png shipped=$OUT/shipped
say "look at $OUT/edited.png, and at the contact sheet beside each video: $OUT/shipped/*.png"

step "Prepare a dataset: H.264 clips, source videos, masks, reference images, captions"
run . python $TINY/world.py $OUT/world --quickstart --mix \
    inpaint=$((4 * CLIPS)) silhouette="$CLIPS" edge="$CLIPS" extension="$CLIPS" outpaint="$CLIPS" reference="$CLIPS"

step "Extract features on $RANKS processes: latents, conditions, prompt embeddings"
run '^clips|^extracted|^rank' vace extract --config $TINY/{data,model,tools}.json \
    --nproc "$RANKS" --num-workers 1 --log-dir $OUT/logs

step "Train a VACE branch on the shipped text-to-video trunk: $ITERATIONS iterations on $RANKS processes with FSDP2"
run ' (iteration +[0-9]+/ +[0-9]+) .* (loss: [^ ]+)' \
    vace train --config $TINY/{pretrain_model,feature_data,tools}.json $TINY/fsdp2_config.yaml \
    --nproc "$RANKS" --micro-batch-size $((16 / RANKS)) --train-iters "$ITERATIONS" --num-workers 0 \
    --optimizer muon --lr 8e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 10 \
    --weight-decay 0.1 --adam-beta2 0.95 --adam-eps 1e-8 \
    --save $OUT/save --ignore-existing-checkpoints --log-interval 10 --log-dir $OUT/logs

step "Convert the checkpoint to the official format, one file"
run tensors vace convert mm_to_hf --source-path $OUT/save --target-path $OUT/weights/vace-trained

step "Generate from the same clips: before training (the trunk alone), and after it"
generate inference.json before --transformer $OUT/weights/vace-trained --context-scale 0
generate inference.json after --transformer $OUT/weights/vace-trained

step "Score the videos, from the mp4 files, and draw them side by side"
run . python $TINY/score.py $OUT/before $OUT/after $OUT/shipped
run . python $TINY/compare.py $OUT/heldout $OUT/quickstart.png before=$OUT/before after=$OUT/after shipped=$OUT/shipped

printf '\nDone in %d s. The requests and their results:\n' $((SECONDS - STARTED))
ls -d "$PWD/$OUT"/{before,after,shipped}/*.mp4
echo "$PWD/$OUT/quickstart.png"

printf '\nNext, in this folder:\n'
if [[ $active != "$VIRTUAL_ENV" && -e $VIRTUAL_ENV/bin/activate ]]; then echo "  source $VIRTUAL_ENV/bin/activate"; fi
cat <<NEXT
  vace generate $TINY/inference.json --prompt "a green cross moves left over a dark background"
  vace ui                              # the same in the browser; first pip install -e '.[ui]': docs/guide/ui.md
  vace serve $TINY/inference.json      # and over HTTP: docs/guide/serve.md
  vace prepare --list                  # what your own clips can become: docs/guide/prepare.md, docs/guide/data.md
  vace init my_project --model 1.3B    # scripts and settings for real weights: examples/vace/README.md
NEXT
