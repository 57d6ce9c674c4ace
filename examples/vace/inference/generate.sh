#!/usr/bin/env bash
# Generates videos on several devices: the processes of this machine, and of others, make each video together, or with
# --data-parallel each videos of its own.
#   NPUS_PER_NODE=8 bash examples/vace/inference/generate.sh CONFIG.json [--key value…]
# The flags are those of Wan-VACE-Inference.py. LOG_DIR (./logs) keeps what all processes said.
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/common.sh"

generate "$@"
