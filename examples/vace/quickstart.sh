#!/usr/bin/env bash
# The whole road on a tiny world: clips → features → training → conversion → generated videos, and how good they are.
# A small text-to-video trunk of the repository learns VACE in a few hundred iterations; the result is shown beside
# what the shipped VACE of that world does. Needs no GPU and no download; a few minutes on two CPU cores.
# Every step is the command that serves the big models; only the files of examples/vace/tiny are small. It can be
# interrupted and run again. It writes to outputs/quickstart.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh
source examples/vace/numbers.sh
environment_ready

TINY=examples/vace/tiny
OUT=outputs/quickstart
RANKS=${NPUS_PER_NODE:-2}       # processes that extract, train and generate
ITERATIONS=${TRAIN_ITERS:-360}  # of training
CLIPS=${CLIPS:-25}              # scenes to train on, of each kind; of inpainting four times as many
SCENES=${SCENES:-2}             # held-out scenes of each kind to generate from
for name in RANKS ITERATIONS CLIPS SCENES; do whole "$name" 1; done
STEPS=8
STARTED=$SECONDS
export MINDSPEED_MM_DEVICE=${MINDSPEED_MM_DEVICE:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$OUT/logs"
number=0

# step TITLE: what comes now.
step() {
    number=$((number + 1))
    printf '\n[%d/%d] %s\n' "$number" "$STEPS" "$1"
}

# run LINES COMMAND...: shows the command, runs it, shows the last LINES of its output; all of it is in a log file.
run() {
    local lines=$1 log began=$SECONDS
    shift
    log=$OUT/logs/$number.log
    printf '      $ %s\n' "$*"
    if ! env "$@" >"$log" 2>&1; then
        printf '      failed; the end of %s:\n' "$log"
        tail -n 25 "$log" | sed 's/^/      | /'
        exit 1
    fi
    if ((lines)); then tail -n "$lines" "$log" | cut -c 1-240 | sed 's/^/      | /'; fi
    printf '      %d s\n' $((SECONDS - began))
}

# generate JSON FOLDER [FLAG...]: every process makes videos of its own.
generate() {
    local json=$1 folder=$2
    shift 2
    run 0 NPUS_PER_NODE="$RANKS" LOG_DIR=$OUT/logs \
        bash examples/vace/inference/generate.sh $OUT/heldout/"$json" --data-parallel --output-path $OUT/"$folder" "$@"
}

step "Write a dataset: H.264 clips, source videos, masks, reference images, captions"
run 0 python $TINY/world.py $OUT/world --quickstart --mix \
    inpaint=$((4 * CLIPS)) silhouette="$CLIPS" edge="$CLIPS" extension="$CLIPS" outpaint="$CLIPS" reference="$CLIPS"

step "Convert the text-to-video trunk to MindSpeed-MM's format"
run 1 mm-convert VACEConverter hf_to_mm --cfg.source_path $TINY/weights/t2v --cfg.target_path $OUT/weights/t2v-mm

step "Extract features on $RANKS processes: latents, conditions, prompt embeddings"
run 2 NPUS_PER_NODE="$RANKS" NUM_WORKERS=1 LOG_DIR=$OUT/logs \
    MM_DATA=$TINY/data.json MM_MODEL=$TINY/model.json MM_TOOL=$TINY/tools.json \
    bash examples/vace/feature_extract/feature_extraction.sh

step "Train the VACE branch for $ITERATIONS iterations on $RANKS processes with FSDP2"
run 2 NPUS_PER_NODE="$RANKS" LOG_DIR=$OUT/logs MBS=$((16 / RANKS)) NUM_WORKERS=0 LR=8e-3 \
    MM_DATA=$TINY/feature_data.json MM_MODEL=$TINY/pretrain_model.json FSDP2_CONFIG=$TINY/fsdp2_config.yaml \
    SAVE_PATH=$OUT/save TRAIN_ITERS="$ITERATIONS" SAVE_INTERVAL="$ITERATIONS" LOG_INTERVAL=10 \
    bash examples/vace/1.3B/pretrain_fsdp.sh --optimizer muon --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 10 --adam-eps 1e-8 \
    --ignore-existing-checkpoints

step "Turn the sharded checkpoint into one file, and that into the official format"
run 1 mm-convert VACEConverter dcp_to_torch --cfg.source_path $OUT/save --cfg.target_path $OUT/save-release
run 1 mm-convert VACEConverter mm_to_hf \
    --cfg.source_path $OUT/save-release --cfg.target_path $OUT/weights/vace-trained

step "Generate from held-out clips: before training (the trunk alone), after it, and with the shipped VACE"
run 0 python $TINY/heldout.py $OUT/heldout --base $TINY/inference.json --count "$SCENES"
generate inference.json before --transformer $OUT/weights/vace-trained --context-scale 0
generate inference.json after --transformer $OUT/weights/vace-trained
generate inference.json shipped

step "The same with a caption, or a picture, changed on purpose"
generate changed.json shipped

step "Score them, from the mp4 files, and draw them side by side"
run 13 python $TINY/score.py $OUT/before $OUT/after $OUT/shipped
run 0 python $TINY/compare.py $OUT/heldout $OUT/quickstart.png before=$OUT/before after=$OUT/after shipped=$OUT/shipped

printf '\nDone in %d s. The requests and their results:\n' $((SECONDS - STARTED))
ls -d "$PWD/$OUT"/{before,after,shipped}/*.mp4
echo "$PWD/$OUT/quickstart.png"
