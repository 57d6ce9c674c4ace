#!/usr/bin/env bash
# Runs every test, on a bare machine too: sets up the environment (scripts/environment.sh), then pytest.
# Two processes share the files of tests; `-n 0` runs them in one.
# Arguments go to pytest: `bash tests/run.sh -m fast` (under a minute), `bash tests/run.sh tests/unit -k floors`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh
environment_ready

# The browser tests of vace ui need chromium; without it they skip and say so.
if [[ -n ${CI:-} ]] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk; } >/dev/null 2>&1 ||
        echo "tests: chromium could not be installed: the browser tests skip" >&2
fi

unset PYTHONDONTWRITEBYTECODE # else each process that a test starts compiles the package again
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
