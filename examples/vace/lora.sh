# shellcheck shell=bash
# What the pretrain_lora.sh of every size share. Sourced, never run by itself.
# A LoRA trains by the same script as the whole branch, with these settings and flags.

source "$(dirname "${BASH_SOURCE[0]}")/numbers.sh"

LORA_RANK=${LORA_RANK:-32}
LORA_ALPHA=${LORA_ALPHA:-$LORA_RANK} # scale = alpha / rank
LORA_ON=${LORA_ON:-branch}           # branch, trunk or both
LORA_INIT_FROM=${LORA_INIT_FROM:-}   # a LoRA to continue from: a file of any dialect, or a SAVE_PATH
FUSE_LORA=${FUSE_LORA:-}             # a LoRA to add to the weights first, such as a few-step one
QUANTIZE=${QUANTIZE:-}               # int8 or fp8: hold the frozen linear layers in 8 bits
export LR=${LR:-1e-4}
export SAVE_INTERVAL=${SAVE_INTERVAL:-250} # checkpoints hold the LoRA alone, so they are small
whole LORA_RANK 1

LORA_ARGS=(--lora-rank "$LORA_RANK" --lora-alpha "$LORA_ALPHA" --lora-on "$LORA_ON")
if [[ -n $LORA_INIT_FROM ]]; then LORA_ARGS+=(--lora-init-from "$LORA_INIT_FROM"); fi
if [[ -n $FUSE_LORA ]]; then LORA_ARGS+=(--fuse-lora "$FUSE_LORA"); fi
if [[ -n $QUANTIZE ]]; then LORA_ARGS+=(--quantize "$QUANTIZE"); fi
