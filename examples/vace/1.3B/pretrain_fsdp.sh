#!/bin/bash
# Trains Wan2.1-VACE-1.3B. The recipe is examples/vace/pretrain.sh; every setting there can be given by environment.
#   SAVE_PATH=./save NPUS_PER_NODE=8 bash examples/vace/1.3B/pretrain_fsdp.sh [--train-iters 100 …]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MM_MODEL=${MM_MODEL:-$HERE/pretrain_model.json}
SAVE_PATH=${SAVE_PATH:-./save/vace_1.3B} # where checkpoints, metrics.jsonl and job.json go
source "$HERE/../pretrain.sh" # GPT_ARGS, MM_ARGS, OUTPUT_ARGS

train "${GPT_ARGS[@]}" "${MM_ARGS[@]}" "${OUTPUT_ARGS[@]}" "$@"
