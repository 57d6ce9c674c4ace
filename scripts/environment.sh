# Sourced by examples/vace/quickstart.sh and tests/run.sh: finds or makes a Python environment with this project in it, and
# puts it first on the PATH. An active environment that has torch is used as it is (its torch stays the same version);
# otherwise ./.venv is made. A second run installs nothing.
#
#   PYTHON=/path/to/python   the interpreter to use or to make .venv with (default: the active one, then python3)

ENVIRONMENT_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Whether "$@" starts a Python that this project runs on.
environment_suits() {
    "$@" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' >/dev/null 2>&1
}

environment_has_torch() {
    "$1" -c 'import importlib.metadata as m; m.version("torch")' >/dev/null 2>&1
}

# pip may write there: not a distribution's own Python.
environment_is_open() {
    "$1" -c 'import os, sys, sysconfig as s
managed = sys.prefix == sys.base_prefix and os.path.exists(os.path.join(s.get_path("stdlib"), "EXTERNALLY-MANAGED"))
sys.exit(managed or not os.access(s.get_path("purelib"), os.W_OK))' >/dev/null 2>&1
}

# Prints the Python to use: the active one when it has torch, else .venv's, which is made when it is not there.
environment_python() {
    local active=${PYTHON:-python3} candidate venv=$ENVIRONMENT_ROOT/.venv
    if environment_suits "$active" && environment_has_torch "$active" && environment_is_open "$active"; then
        "$active" -c 'import sys; print(sys.executable)'
        return
    fi
    if ! environment_suits "$venv/bin/python"; then
        for candidate in "$active" python3.12 python3.11 python3.13 python3.10; do
            environment_suits "$candidate" && break
            candidate=
        done
        if [[ -z $candidate ]]; then
            echo "environment: no Python 3.10 or newer found; install one, or set PYTHON to its path" >&2
            return 1
        fi
        echo "environment: making $venv with $("$candidate" --version)" >&2
        if ! "$candidate" -m venv --clear "$venv" >&2; then
            echo "environment: '$candidate -m venv' failed; on Debian and Ubuntu it is in the package python3-venv" >&2
            return 1
        fi
    fi
    echo "$venv/bin/python"
}

# What decides whether something must be installed again, as one word.
environment_stamp() {
    cat "$ENVIRONMENT_ROOT/setup.py" "$ENVIRONMENT_ROOT/constraints.txt" - <<<"$ENVIRONMENT_ROOT" | cksum | tr ' ' '-'
}

# constraints.txt, but with the versions that $1 must keep: torch where it is installed, and numpy beside torch_npu (CANN's
# own Python tools are bound to it).
environment_constraints() {
    "$1" - "$ENVIRONMENT_ROOT/constraints.txt" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


kept = {name: installed(name) for name in ("torch", *(["numpy"] if installed("torch_npu") else []))}
for line in open(sys.argv[1]):
    name = line.split("==")[0].strip()
    if not kept.get(name):
        sys.stdout.write(line)
for name, found in kept.items():
    if found:
        sys.stdout.write(f"{name}=={found}\n")
PYTHON
}

# Finds or makes the environment, installs what is missing, activates it.
environment_ready() {
    local python prefix stamp constraints log
    python=$(environment_python)
    prefix=$("$python" -c 'import sys; print(sys.prefix)')
    stamp=$prefix/.mindspeed-mm-vace
    if [[ $(cat "$stamp" 2>/dev/null) != $(environment_stamp) ]]; then
        constraints=$(mktemp) log=$(mktemp)
        environment_constraints "$python" >"$constraints"
        echo "environment: installing this project and its dependencies into $prefix"
        echo "environment: torch $(sed -n 's/^torch==//p' "$constraints"), the rest as in constraints.txt; this happens once and can take minutes"
        if ! (cd "$ENVIRONMENT_ROOT" && "$python" -m pip install --disable-pip-version-check -c "$constraints" -e '.[dev]') >"$log" 2>&1; then
            tail -n 25 "$log" >&2
            echo "environment: pip failed; its whole output is in $log" >&2
            return 1
        fi
        rm -f "$constraints" "$log"
        environment_stamp >"$stamp"
    fi
    export PATH=$prefix/bin:$PATH VIRTUAL_ENV=$prefix
    unset PYTHON PYTHONHOME
    echo "environment: $prefix, $("$python" -c 'import platform, importlib.metadata as m; print(f"Python {platform.python_version()}, torch", m.version("torch"))')"
}
