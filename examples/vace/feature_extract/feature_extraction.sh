#!/usr/bin/env bash
# Encodes clips, masks, references and captions into features, on every rank. Run it again after an interruption, or
# after the dataset changed: existing features stay. Every setting can be edited here, or given from outside:
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

extract "${EXTRACT_ARGS[@]}" "${MM_ARGS[@]}" "$@"
