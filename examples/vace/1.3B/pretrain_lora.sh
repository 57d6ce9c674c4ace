#!/bin/bash
# Trains a LoRA of Wan2.1-VACE-1.3B. Settings: examples/vace/lora.sh, and those of pretrain_fsdp.sh; more flags may follow the command.
#   LORA_RANK=32 LORA_ON=branch SAVE_PATH=./save bash examples/vace/1.3B/pretrain_lora.sh [--train-iters 100 …]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/../lora.sh"
export SAVE_PATH=${SAVE_PATH:-./save/vace_1.3B_lora}
exec bash "$HERE/pretrain_fsdp.sh" "${LORA_ARGS[@]}" "$@"
