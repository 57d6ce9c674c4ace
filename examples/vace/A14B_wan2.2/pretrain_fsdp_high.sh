#!/bin/bash
# Trains the high-noise expert of Wan2.2-VACE-A14B. The recipe is examples/vace/pretrain.sh; every setting there can be given by environment.
#   SAVE_PATH=./save NPUS_PER_NODE=8 bash examples/vace/A14B_wan2.2/pretrain_fsdp_high.sh [--train-iters 100 …]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MM_MODEL=${MM_MODEL:-$HERE/pretrain_model_high.json}
SAVE_PATH=${SAVE_PATH:-./save/vace_A14B_high} # where checkpoints, metrics.jsonl and job.json go
source "$HERE/../pretrain.sh" # GPT_ARGS, MM_ARGS, OUTPUT_ARGS

train "${GPT_ARGS[@]}" "${MM_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
