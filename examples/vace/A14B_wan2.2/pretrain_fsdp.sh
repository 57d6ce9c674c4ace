#!/bin/bash
# Trains one expert of Wan2.2-VACE-A14B: EXPERT=high or EXPERT=low.
#   EXPERT=high SAVE_PATH=./save bash examples/vace/A14B_wan2.2/pretrain_fsdp.sh
set -euo pipefail
EXPERT=${EXPERT:?set EXPERT to high or low: which of the two experts to train}
if [[ $EXPERT != high && $EXPERT != low ]]; then
    echo "EXPERT is '$EXPERT'; set it to high or low" >&2
    exit 1
fi
exec bash "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/pretrain_fsdp_$EXPERT.sh" "$@"
