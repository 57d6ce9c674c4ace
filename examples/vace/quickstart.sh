#!/usr/bin/env bash
# The whole road on tiny weights: clips → checkpoints → features → training → conversion → a generated video.
# Sets up its environment, needs no GPU and no download of weights, and takes a few minutes on two CPU cores.
# Every step is the command that serves the big models; only the files of examples/vace/tiny are small. It can be
# interrupted and run again. Everything it writes lies in outputs/quickstart.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh
environment_ready

TINY=examples/vace/tiny
OUT=outputs/quickstart
RANKS=${NPUS_PER_NODE:-2}       # processes that extract and train
ITERATIONS=${TRAIN_ITERS:-10}   # of training
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

# A port that nobody listens on, so that two runs on one machine do not meet.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); import sys; sys.stdout.write(str(s.getsockname()[1]))'
}

step "Write a small dataset: H.264 clips, source videos, masks, reference images, captions"
run 0 python $TINY/world.py $OUT/world --quickstart

step "Write tiny checkpoints in the official file formats"
run 0 python $TINY/checkpoints.py $OUT/weights/Tiny-VACE

step "Convert the transformer to MindSpeed-MM's format"
run 1 mm-convert VACEConverter hf_to_mm \
    --cfg.source_path $OUT/weights/Tiny-VACE --cfg.target_path $OUT/weights/Tiny-VACE-mm

step "Extract features on $RANKS processes: latents, conditions, prompt embeddings"
run 2 NPUS_PER_NODE="$RANKS" MASTER_PORT="$(free_port)" NUM_WORKERS=1 LOG_DIR=$OUT/logs \
    MM_DATA=$TINY/data.json MM_MODEL=$TINY/model.json MM_TOOL=$TINY/tools.json \
    bash examples/vace/feature_extract/feature_extraction.sh

step "Train the VACE branch for $ITERATIONS iterations on $RANKS processes with FSDP2"
run 2 NPUS_PER_NODE="$RANKS" MASTER_PORT="$(free_port)" LOG_DIR=$OUT/logs \
    MM_DATA=$TINY/feature_data.json MM_MODEL=$TINY/pretrain_model.json SAVE_PATH=$OUT/save \
    bash examples/vace/1.3B/pretrain_fsdp.sh --train-iters "$ITERATIONS" --save-interval "$ITERATIONS" --num-workers 0

step "Turn the sharded checkpoint into one file, and that into the official format"
checkpoint=$OUT/save/iter_$(printf '%07d' "$ITERATIONS")
mkdir -p $OUT/save-release/release/mp_rank_00
run 0 python -m torch.distributed.checkpoint.format_utils dcp_to_torch \
    "$checkpoint" $OUT/save-release/release/mp_rank_00/model_optim_rng.pt
echo "release" >$OUT/save-release/latest_checkpointed_iteration.txt
run 1 mm-convert VACEConverter mm_to_hf \
    --cfg.source_path $OUT/save-release --cfg.target_path $OUT/weights/Tiny-VACE-trained

step "Write held-out clips and what to generate from them"
run 0 python $TINY/heldout.py $OUT/heldout --base $TINY/inference.json --count 1 --kinds inpaint silhouette reference

step "Generate with the trained weights"
run 0 python examples/vace/inference/Wan-VACE-Inference.py $OUT/heldout/inference.json

printf '\nDone in %d s. The weights are random and saw %d iterations, so the pictures show the road, not quality.\n' \
    $((SECONDS - STARTED)) "$ITERATIONS"
for result in "$PWD/$OUT"/results/*.mp4 "$PWD/$OUT"/results/*.png; do
    if [[ -e $result ]]; then echo "$result"; fi
done
