#!/usr/bin/env bash
# Encodes clips, masks, references and captions into features, on every rank. Run it again after an interruption, or
# after the dataset changed: what is there already stays. Every setting can be edited here, or given from outside:
#   NPUS_PER_NODE=2 MM_DATA=my_data.json bash examples/vace/feature_extract/feature_extraction.sh --skip-bad-samples 5
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

MM_DATA=${MM_DATA:-./examples/vace/feature_extract/data.json}   # which clips, how they are cut
MM_MODEL=${MM_MODEL:-./examples/vace/feature_extract/model.json} # VAE and text encoder
MM_TOOL=${MM_TOOL:-./mindspeed_mm/tools/tools.json}             # sorafeature.save_path: where features go
NUM_WORKERS=${NUM_WORKERS:-8}                                   # processes that read ahead, for each rank

EXTRACT_ARGS=(
    --num-workers "$NUM_WORKERS"
)
MM_ARGS=(
    --mm-data "$MM_DATA"
    --mm-model "$MM_MODEL"
    --mm-tool "$MM_TOOL"
)
ARGS=("${EXTRACT_ARGS[@]}" "${MM_ARGS[@]}" "$@")
SCRIPT=$REPOSITORY/mindspeed_mm/tools/feature_extraction/get_vace_feature.py

if has --dry-run "${ARGS[@]}" || has --print-config "${ARGS[@]}" || has --help "${ARGS[@]}" || has -h "${ARGS[@]}"; then
    exec python "$SCRIPT" "${ARGS[@]}"
fi
mkdir -p "$LOG_DIR"
log=$LOG_DIR/extract_$(date +%Y%m%d_%H%M%S)_node$NODE_RANK.log
# everything that can be known without a device is checked once, before the ranks start: files, settings, every clip
WORLD_SIZE=$RANKS python "$SCRIPT" "${ARGS[@]}" --dry-run | tee "$log"
echo "log: $log"

status=0
attend "$log" torchrun "${DISTRIBUTED_ARGS[@]}" "$SCRIPT" "${ARGS[@]}" --no-check-clips || status=$?
chmod 440 "$log"
exit "$status"
