#!/bin/bash
# Trains a LoRA of one expert of Wan2.2-VACE-A14B: EXPERT=high or EXPERT=low. Settings: examples/vace/lora.sh, and those of
# pretrain_fsdp_high.sh and pretrain_fsdp_low.sh; more flags may follow the command.
#   EXPERT=high LORA_RANK=32 SAVE_PATH=./save bash examples/vace/A14B_wan2.2/pretrain_lora.sh [--train-iters 100 …]
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/../lora.sh"
if [[ -n ${EXPERT:-} ]]; then export SAVE_PATH=${SAVE_PATH:-./save/vace_A14B_${EXPERT}_lora}; fi
exec bash "$HERE/pretrain_fsdp.sh" "${LORA_ARGS[@]}" "$@"
