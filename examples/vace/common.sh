# shellcheck shell=bash
# What the training and extraction scripts share. A script sets its arrays, then calls `train`. Sourced, never run by itself.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PACKAGE=$REPOSITORY/mindspeed_mm # of a checkout; in a folder that `vace init` made, the installed one
if [[ ! -d $PACKAGE ]]; then
    PACKAGE=$(python -c 'from importlib.util import find_spec; print(find_spec("mindspeed_mm").submodule_search_locations[0])')
fi
source "$REPOSITORY/examples/vace/numbers.sh"

# Ascend's environment, where it is installed.
ASCEND_ENV=${ASCEND_ENV:-/usr/local/Ascend/cann/set_env.sh}
if [[ ! -e $ASCEND_ENV && -e /usr/local/Ascend/ascend-toolkit/set_env.sh ]]; then
    ASCEND_ENV=/usr/local/Ascend/ascend-toolkit/set_env.sh
fi
if [[ -e $ASCEND_ENV ]]; then
    set +u # Ascend's script reads variables that need not be there
    # shellcheck disable=SC1090
    source "$ASCEND_ENV"
    set -u
    export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
    export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
    export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
    export NPU_ASD_ENABLE=${NPU_ASD_ENABLE:-0}
    export ASCEND_LAUNCH_BLOCKING=${ASCEND_LAUNCH_BLOCKING:-0}
    export ACLNN_CACHE_LIMIT=${ACLNN_CACHE_LIMIT:-100000}
fi
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-2} # FSDP2 overlaps only with more than 1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}

# Where the ranks are.
NPUS_PER_NODE=${NPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
whole NPUS_PER_NODE 1
whole NNODES 1
whole NODE_RANK 0
if ((NODE_RANK >= NNODES)); then
    echo "NODE_RANK=$NODE_RANK: expected less than NNODES=$NNODES; nodes count from 0" >&2
    exit 1
fi
if ((NNODES > 1)); then MASTER_PORT=${MASTER_PORT:-6000}; else MASTER_PORT=${MASTER_PORT:-0}; fi # 0 = a free one
whole MASTER_PORT 0
RANKS=$((NPUS_PER_NODE * NNODES))

DISTRIBUTED_ARGS=(
    --nproc_per_node "$NPUS_PER_NODE"
    --nnodes "$NNODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --master_port "$MASTER_PORT"
)

# How the batch is made; GBS and DP follow as in Megatron.
TP=${TP:-1}
PP=${PP:-1}
VP=${VP:-1}
CP=${CP:-1}
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
for number in TP PP VP CP MBS GRAD_ACC_STEP; do whole "$number" 1; done
DP=$((RANKS / (TP * PP * CP)))
GBS=${GBS:-$((MBS * GRAD_ACC_STEP * DP))}
whole GBS 0 # 0: fewer ranks than CP takes; the check of the job says it better

LOG_DIR=${LOG_DIR:-logs}

# has FLAG ARG...: whether FLAG is among the arguments.
has() {
    local flag=$1 argument
    shift
    for argument in "$@"; do [[ $argument == "$flag" ]] && return 0; done
    return 1
}

# The functions below end the script: a Python process takes its place, so that whatever ends the script ends the run.

# launch NAME FLAG... SCRIPT ARG...: SCRIPT on every device, with its lines on the screen and in LOG_DIR.
launch() {
    local name=$1
    shift
    exec python -m mindspeed_mm.tools.launch "${DISTRIBUTED_ARGS[@]}" --log_dir "$LOG_DIR" --name "$name" "$@"
}

# only_checks ARG...: whether nothing is to be launched.
only_checks() {
    has --dry-run "$@" || has --print-config "$@" || has --help "$@" || has -h "$@"
}

# train ARG...: check the job once, in one process and without torch; then launch it on every rank.
train() {
    local script=$REPOSITORY/pretrain_vace.py
    export WORLD_SIZE=$RANKS # of the check
    if only_checks "$@"; then exec python "$script" "$@" --dry-run; fi
    launch train --check="--dry-run --check-inputs" --report_batch "$GBS" "$script" "$@"
}

# extract ARG...: everything that can be known without a device is checked once: files, settings, every clip; then launch it.
extract() {
    local script=$PACKAGE/tools/feature_extraction/get_vace_feature.py
    export WORLD_SIZE=$RANKS # of the check
    if only_checks "$@"; then exec python "$script" "$@"; fi
    launch extract --check=--dry-run --show_check --rank_flags=--no-check-clips "$script" "$@"
}

# generate ARG...: check the job once, in one process and without torch; then launch it on every rank.
generate() {
    local script=$REPOSITORY/examples/vace/inference/Wan-VACE-Inference.py
    if only_checks "$@"; then exec python "$script" "$@"; fi
    launch generate --check="--dry-run --check-inputs" "$script" "$@"
}
