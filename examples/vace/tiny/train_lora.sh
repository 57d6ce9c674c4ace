#!/usr/bin/env bash
# A LoRA of the tiny world's VACE learns a new look: shapes in orange, a colour and a word that the shipped weights never saw.
# Clips → features → a LoRA of trunk and branch → the same requests without and with it, scored, and side by side in lora.png.
# About a minute of training on two CPU cores. Every step is the command that serves the big models. It can be run again.
#   RANKS=2 TRAIN_ITERS=200 bash examples/vace/tiny/train_lora.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/environment.sh
source examples/vace/numbers.sh
environment_ready

TINY=examples/vace/tiny
OUT=outputs/tiny_lora
RANKS=${NPUS_PER_NODE:-2}
ITERATIONS=${TRAIN_ITERS:-200}
CLIPS=${CLIPS:-16}  # of each kind
SCENES=${SCENES:-4} # held-out scenes of each kind
for name in RANKS ITERATIONS CLIPS SCENES; do whole "$name" 1; done
export MINDSPEED_MM_DEVICE=${MINDSPEED_MM_DEVICE:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The files of the quickstart, for this folder and the shipped VACE.
mkdir -p $OUT/logs
for name in data.json feature_data.json tools.json; do
    sed "s#outputs/quickstart#$OUT#g; s#$TINY/data.txt#$OUT/data.txt#" $TINY/$name >$OUT/$name
done
sed "s#$TINY/weights/t2v/#$TINY/weights/vace/#; s#\"init_from_trunk\": true#\"init_from_trunk\": false#" \
    $TINY/pretrain_model.json >$OUT/pretrain_model.json

# Half of the clips show the new colour. The others have the old ones, so that these stay what they are.
python $TINY/world.py $OUT/new --split new --colour orange --mix \
    plain="$CLIPS" inpaint="$CLIPS" silhouette="$CLIPS" edge="$CLIPS"
python $TINY/world.py $OUT/old --split old --mix inpaint="$CLIPS" silhouette="$CLIPS" edge="$CLIPS"
printf './%s,./%s/data.json\n' $OUT/new $OUT/new $OUT/old $OUT/old >$OUT/data.txt
env NPUS_PER_NODE="$RANKS" NUM_WORKERS=1 LOG_DIR=$OUT/logs MM_DATA=$OUT/data.json MM_MODEL=$TINY/model.json MM_TOOL=$OUT/tools.json \
    bash examples/vace/feature_extract/feature_extraction.sh

env NPUS_PER_NODE="$RANKS" LOG_DIR=$OUT/logs MBS=$((16 / RANKS)) NUM_WORKERS=0 LR=${LR:-2e-3} \
    MM_DATA=$OUT/feature_data.json MM_MODEL=$OUT/pretrain_model.json FSDP2_CONFIG=$TINY/fsdp2_config.yaml \
    LORA_ON=both LORA_RANK=16 SAVE_PATH=$OUT/save TRAIN_ITERS="$ITERATIONS" SAVE_INTERVAL="$ITERATIONS" LOG_INTERVAL=10 \
    bash examples/vace/1.3B/pretrain_lora.sh --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 10 --adam-eps 1e-8 \
    --ignore-existing-checkpoints
mm-convert VACEConverter lora_to_comfy --cfg.source_path $OUT/save --cfg.target_path $OUT/orange.safetensors \
    --cfg.base_path $TINY/weights/vace

# Orange for the held-out clips, without and with the LoRA; then, with it, an old colour.
python $TINY/heldout.py $OUT/heldout --base $TINY/inference.json --count "$SCENES" --colour orange \
    --kinds inpaint silhouette edge
for name in before after; do
    requests=inference.json
    lora=()
    if [[ $name == after ]]; then
        requests=all.json
        lora=(--loras $OUT/orange.safetensors)
    fi
    env NPUS_PER_NODE="$RANKS" LOG_DIR=$OUT/logs bash examples/vace/inference/generate.sh $OUT/heldout/$requests \
        --data-parallel --output-path $OUT/$name "${lora[@]}"
done
python $TINY/score.py --colour orange $OUT/before $OUT/after
python $TINY/compare.py $OUT/heldout $OUT/lora.png before=$OUT/before after=$OUT/after
echo "$PWD/$OUT/lora.png"
