#!/usr/bin/env bash
# Makes the tiny world's weights from nothing: VAE, text encoder, text-to-video trunk, VACE. What is shipped is in
# examples/vace/tiny/weights. Everything but the VAE goes through the ordinary commands. Their README.md says how long it takes.
# A finished part is not made again. To make NAME again, remove NAME and save_NAME under outputs/tiny_weights, and those of
# the parts after it, which start from it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/environment.sh
source examples/vace/numbers.sh
environment_ready

MAKE=examples/vace/tiny/make
OUT=outputs/tiny_weights # the files in $MAKE name it too
RANKS=${NPUS_PER_NODE:-2}
TRUNK_ITERS=${TRUNK_ITERS:-1000}
VACE_ITERS=${VACE_ITERS:-1900}
BRANCH_ITERS=${BRANCH_ITERS:-300}
for name in RANKS TRUNK_ITERS VACE_ITERS BRANCH_ITERS; do whole "$name" 1; done
export MINDSPEED_MM_DEVICE=${MINDSPEED_MM_DEVICE:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# pretrain NAME ITERATIONS: trains make/pretrain_NAME.json, and writes the result in the official format to $OUT/NAME.
pretrain() {
    local name=$1 iterations=$2
    if [[ -e $OUT/$name/config.json ]]; then return; fi
    local load=''
    if [[ -e $OUT/save_$name/latest_checkpointed_iteration.txt ]]; then load=$OUT/save_$name; fi
    env NPUS_PER_NODE="$RANKS" MBS=$((32 / RANKS)) LOG_DIR=$OUT/logs LOG_INTERVAL=50 NUM_WORKERS=0 LOAD="$load" \
        MM_DATA=$MAKE/feature_data.json MM_MODEL=$MAKE/pretrain_"$name".json MM_TOOL=$MAKE/tools.json \
        FSDP2_CONFIG=examples/vace/tiny/fsdp2_config.yaml SAVE_PATH=$OUT/save_"$name" \
        bash examples/vace/1.3B/pretrain_fsdp.sh --train-iters "$iterations" --save-interval 200 --save-retain-interval "$iterations" \
        --optimizer muon --lr 2e-3 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 50 --weight-decay 0.01 --adam-eps 1e-8
    mm-convert VACEConverter mm_to_hf --cfg.source_path $OUT/save_"$name" --cfg.target_path $OUT/"$name" --cfg.dtype bf16
}

mkdir -p $OUT/weights
torchrun --standalone --nproc-per-node "$RANKS" examples/vace/tiny/train_vae.py $OUT/weights/Wan2.1_VAE.pth --resume
python examples/vace/tiny/checkpoints.py $OUT/weights --text-only 64

# 2800 scenes, each under one condition; the trunk learns from the same clips without their conditions.
if [[ ! -e $OUT/world/data.json ]]; then
    python examples/vace/tiny/world.py $OUT/world --mix \
        plain=150 inpaint=650 silhouette=300 edge=325 extension=650 outpaint=125 reference=600
fi
env NPUS_PER_NODE="$RANKS" LOG_DIR=$OUT/logs MM_DATA=$MAKE/data.json MM_MODEL=$MAKE/model.json MM_TOOL=$MAKE/tools.json \
    bash examples/vace/feature_extract/feature_extraction.sh

pretrain trunk "$TRUNK_ITERS"
pretrain all "$VACE_ITERS"      # what is shipped; no shift of the noise, so that details are trained as much as the whole
pretrain branch "$BRANCH_ITERS" # for comparison: the trunk stays as it is

# Held-out scenes, and how well each of them did.
for name in branch all; do
    sed "s#TRANSFORMER#./$OUT/$name#; s#RESULTS#./$OUT/results/$name#" $MAKE/inference.json >$OUT/inference_$name.json
    python examples/vace/tiny/heldout.py $OUT/heldout --base $OUT/inference_$name.json --count 12
    for requests in inference changed; do
        env NPUS_PER_NODE="$RANKS" LOG_DIR=$OUT/logs bash examples/vace/inference/generate.sh $OUT/heldout/$requests.json --data-parallel
    done
done
python examples/vace/tiny/score.py $OUT/results/branch $OUT/results/all
