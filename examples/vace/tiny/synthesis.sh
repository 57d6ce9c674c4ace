#!/usr/bin/env bash
# Train the branch of the tiny world on plain clips and captions: every condition is drawn by synthesis/recipe.yaml.
# Then generate from held-out scenes, whose edges `task` of the inference JSON makes, and score the results.
# Needs what quickstart.sh needs; writes to outputs/synthesis.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/environment.sh
source examples/vace/numbers.sh
environment_ready

TINY=examples/vace/tiny
OUT=outputs/synthesis
RANKS=${NPUS_PER_NODE:-2}       # processes that extract, train and generate
ITERATIONS=${TRAIN_ITERS:-800}  # of training
CLIPS=${CLIPS:-200}            # scenes to train on
SCENES=${SCENES:-4}             # held-out scenes of each kind
for name in RANKS ITERATIONS CLIPS SCENES; do whole "$name" 1; done
export MINDSPEED_MM_DEVICE=${MINDSPEED_MM_DEVICE:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export NPUS_PER_NODE=$RANKS LOG_DIR=$OUT/logs
mkdir -p "$OUT/logs"

python $TINY/world.py $OUT/world --count "$CLIPS" --kinds plain
mm-convert VACEConverter hf_to_mm --cfg.source_path $TINY/weights/t2v --cfg.target_path $OUT/weights/t2v-mm

NUM_WORKERS=1 MM_DATA=$TINY/data.json MM_MODEL=$TINY/model.json MM_TOOL=$TINY/tools.json \
    bash examples/vace/feature_extract/feature_extraction.sh --save-path $OUT/features \
    --set data.dataset_param.basic_parameters.data_path=$OUT/world/data.json \
    --set data.dataset_param.synthesis=$TINY/synthesis/recipe.yaml

MBS=$((16 / RANKS)) NUM_WORKERS=0 LR=8e-3 MM_DATA=$TINY/feature_data.json MM_MODEL=$TINY/pretrain_model.json \
    FSDP2_CONFIG=$TINY/fsdp2_config.yaml SAVE_PATH=$OUT/save TRAIN_ITERS="$ITERATIONS" SAVE_INTERVAL="$ITERATIONS" \
    LOG_INTERVAL=10 bash examples/vace/1.3B/pretrain_fsdp.sh --optimizer muon --min-lr 1e-4 --lr-decay-style cosine \
    --lr-warmup-iters 10 --adam-eps 1e-8 --ignore-existing-checkpoints \
    --set data.dataset_param.basic_parameters.data_path=$OUT/features/data.jsonl \
    --set data.dataset_param.basic_parameters.data_folder=$OUT/features \
    --set model.predictor.from_pretrained=$OUT/weights/t2v-mm

mm-convert VACEConverter dcp_to_torch --cfg.source_path $OUT/save --cfg.target_path $OUT/save-release
mm-convert VACEConverter mm_to_hf --cfg.source_path $OUT/save-release --cfg.target_path $OUT/weights/vace-trained

python $TINY/heldout.py $OUT/heldout --base $TINY/inference.json --count "$SCENES" --kinds inpaint edge extension
python $TINY/synthesis/requests.py $OUT/heldout
bash examples/vace/inference/generate.sh $OUT/heldout/inference.json --data-parallel --output-path $OUT/results \
    --transformer $OUT/weights/vace-trained
python $TINY/score.py $OUT/results
