# shellcheck shell=bash
# What the training and extraction scripts share. A script sets its arrays, then calls `train`. Sourced, never run by itself.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

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
MASTER_PORT=${MASTER_PORT:-6000}
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
DP=$((RANKS / (TP * PP * CP)))
GBS=${GBS:-$((MBS * GRAD_ACC_STEP * DP))}

LOG_DIR=${LOG_DIR:-logs}

# has FLAG ARG...: whether FLAG is among the arguments.
has() {
    local flag=$1 argument
    shift
    for argument in "$@"; do [[ $argument == "$flag" ]] && return 0; done
    return 1
}

# train ARG...: check the job once, in one process and without torch; then launch it on every rank.
train() {
    local dry=(env WORLD_SIZE="$RANKS" python "$REPOSITORY/pretrain_vace.py" "$@" --dry-run)
    if has --dry-run "$@" || has --print-config "$@" || has --help "$@" || has -h "$@"; then
        "${dry[@]}"
        return
    fi
    "${dry[@]}" --check-inputs >/dev/null
    mkdir -p "$LOG_DIR" "$SAVE_PATH"
    local log
    log=$LOG_DIR/train_$(date +%Y%m%d_%H%M%S)_node$NODE_RANK.log
    echo "log: $log"
    attend "$log" torchrun "${DISTRIBUTED_ARGS[@]}" "$REPOSITORY/pretrain_vace.py" "$@" # when it fails, the script ends there
    chmod 440 "$log"
    report "$log"
}

# attend LOG COMMAND...: runs the command with its output on the screen and at the end of LOG, and answers with its exit code.
# SIGTERM is passed on and the command's end awaited: a pipe in the foreground would let this script die and the command run on.
attend() {
    local log=$1 child printer status
    shift
    # torchrun leaves ranks that it stops 30 seconds; saving, or a clip at hand, may need longer (torch before 2.9 knows no other time)
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
    # ranks write into a pipe: one of them draws its progress bar on the terminal itself
    if [[ -t 2 ]]; then export MINDSPEED_MM_TERMINAL=${MINDSPEED_MM_TERMINAL-$(tty <&2)}; fi
    exec 3> >(trap '' TERM INT && tee -a "$log" | screen) # what the command says when it is asked to stop is still shown
    printer=$!
    "$@" >&3 2>&1 3>&- &
    child=$!
    exec 3>&-
    trap 'pass_on "$log" "$child"' TERM
    trap : INT # a terminal's Ctrl-C reaches torchrun by itself
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - TERM INT
    wait "$printer" || true
    return "$status"
}

# pass_on LOG PID: SIGTERM for torchrun, unless it got its own: a scheduler signals every process, and a second one would disturb it.
pass_on() {
    local try
    for try in 1 2 3 4 5; do
        if grep -qs "death signal" "$1"; then return 0; fi
        sleep 0.2
    done
    kill -TERM "$2" 2>/dev/null || true
}

# screen: everything, but of errors one line, the lowest failing rank's, and nothing of torchrun's own report on it. A rank
# that only lost the others speaks if nobody else does. Errors are awaited for two seconds after the first. When ranks say that
# they were asked to stop, torchrun's traceback about it adds nothing.
screen() {
    local line failed="" said="" stopped="" report="" lowest="" number status clear=""
    if [[ -t 1 && -n ${MINDSPEED_MM_TERMINAL:-} ]]; then clear=$'\r\e[K'; fi # the progress bar may stand in this line
    while true; do
        status=0
        if [[ -n $failed && -z $said ]]; then
            IFS= read -r -t 2 line || status=$?
            if ((status > 0)); then
                said=1
                printf '%s%s\n' "$clear" "$failed"
            fi
        else
            IFS= read -r line || status=$?
        fi
        if ((status > 128)); then continue; fi # two seconds are over
        if ((status > 0)); then return 0; fi
        if [[ $line =~ ^\[rank\ ([0-9]+)\]\ [A-Za-z]+Error: ]]; then
            number=${BASH_REMATCH[1]}
            if [[ $line == *" lost the others in "* ]]; then number=$((number + 1000000)); fi
            if [[ -z $lowest ]] || ((number < lowest)); then lowest=$number failed=$line; fi
            continue
        fi
        if [[ $line == "stopped by SIG"* || $line == "exiting after iteration "*" SIGTERM was received" ]]; then stopped=1; fi
        if [[ -n $failed && $line == *torch/distributed/elastic/* ]]; then report=1; fi
        if [[ -n $stopped && $line == "Traceback (most recent call last):" ]]; then report=1; fi
        if [[ -z $report ]]; then printf '%s%s\n' "$clear" "$line"; fi
    done
}

# report LOG: the mean of the log's iteration times, from the 101st to the 200th where there are that many.
report() {
    local step_time
    step_time=$( (grep "elapsed time per iteration" "$1" || true) | awk -F ':' '{print $5}' | awk -F '|' '{print $1}' |
        awk 'NR <= 200 {t[NR] = $1} END {n = NR < 200 ? NR : 200; first = n > 100 ? n - 99 : 1
             for (i = first; i <= n; i++) sum += t[i]; if (n > 0) printf("%.1f", sum / (n - first + 1))}')
    if [[ -z $step_time ]]; then
        if ((NODE_RANK == NNODES - 1)); then echo "no iteration was logged; see $1"; fi
        return 0 # the last rank logs: other nodes have no lines
    fi
    local samples
    samples=$(awk -v gbs="$GBS" -v ms="$step_time" 'BEGIN {printf("%.3f", gbs * 1000 / ms)}')
    echo "Elapsed Time Per iteration: $step_time, Average Samples per Second: $samples"
}

# generate ARG...: check the job once, in one process and without torch; then launch it on every rank.
generate() {
    local script=$REPOSITORY/examples/vace/inference/Wan-VACE-Inference.py
    if has --dry-run "$@" || has --print-config "$@" || has --help "$@" || has -h "$@"; then
        python "$script" "$@"
        return
    fi
    python "$script" "$@" --dry-run --check-inputs >/dev/null
    mkdir -p "$LOG_DIR"
    local log
    log=$LOG_DIR/generate_$(date +%Y%m%d_%H%M%S)_node$NODE_RANK.log
    echo "log: $log"
    attend "$log" torchrun "${DISTRIBUTED_ARGS[@]}" "$script" "$@"
    chmod 440 "$log"
}
