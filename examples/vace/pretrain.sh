# shellcheck shell=bash
# What the training scripts share: the recipe, and the flags that it becomes. A script names its model first; then it calls
# `train`, which starts one process per device (common.sh). Sourced, never run by itself.
# Every setting can be given by environment; a script may also add flags of its own: GPT_ARGS+=(--lr-warmup-iters 100).

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MM_DATA=${MM_DATA:-$HERE/feature_data.json}
MM_TOOL=${MM_TOOL:-$PACKAGE/tools/tools.json}
FSDP2_CONFIG=${FSDP2_CONFIG:-$REPOSITORY/examples/vace/fsdp2_config.yaml}
LOAD=${LOAD:-} # a SAVE_PATH to resume from

GPT_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --virtual-pipeline-model-parallel-size "$VP"
    --context-parallel-size "$CP"
    --context-parallel-algo ulysses_cp_algo
    --micro-batch-size "$MBS"
    --global-batch-size "$GBS"
    --num-workers "${NUM_WORKERS:-8}"
    --seed "${SEED:-1234}"
    --lr "${LR:-5e-5}"
    --min-lr "${MIN_LR:-${LR:-5e-5}}"
    --adam-beta1 0.9
    --adam-beta2 0.95
    --adam-eps 1e-5
    --lr-decay-style constant
    --weight-decay 0.1
    --lr-warmup-init 0
    --lr-warmup-iters 0
    --clip-grad 1.0
    --train-iters "${TRAIN_ITERS:-5000}"
    --use-torch-fsdp2
    --fsdp2-config-path "$FSDP2_CONFIG"
    --ckpt-format torch_dcp
    --distributed-timeout-minutes "${DISTRIBUTED_TIMEOUT_MINUTES:-20}"
)

MM_ARGS=(
    --mm-data "$MM_DATA"
    --mm-model "$MM_MODEL"
    --mm-tool "$MM_TOOL"
)

OUTPUT_ARGS=(
    --log-interval "${LOG_INTERVAL:-1}"
    --log-throughput
    --save-interval "${SAVE_INTERVAL:-1000}"
    --eval-interval "${EVAL_INTERVAL:-1000}"
    --eval-iters "${EVAL_ITERS:-10}"
    --save "$SAVE_PATH"
    --exit-signal-handler
)
if [[ -n $LOAD ]]; then OUTPUT_ARGS+=(--load "$LOAD"); fi
