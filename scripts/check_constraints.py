"""Checks constraints.txt for Python 3.10 to 3.13 on x86_64 and aarch64.

Every pin has a wheel there, and the pins fit each other.

`python scripts/check_constraints.py [3.10 3.11 …]` asks pip (`--dry-run --only-binary=:all:`), which reads
the packages' metadata and downloads no wheel. pip evaluates environment markers for the Python it runs on,
whatever --python-version says; so they are evaluated here, and the requirements that each package states are
compared with the pins here too. Extras are left out, and so are the CUDA libraries, which torch pins in its
own metadata.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBCS = (39, 35, 34, 31, 28, 27, 24, 17)  # manylinux_2_N tags that a machine with glibc 2.39 accepts
SYSTEM = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "implementation_name": "cpython",
}
FROM_TORCH = ("nvidia-", "cuda-", "triton")


def environment(python: str, machine: str) -> dict[str, str]:
    """What the markers of a requirement see there."""
    names = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "extra": "",
    }
    return {**SYSTEM, **names, "platform_python_implementation": "CPython"}


def pins(python: str, machine: str) -> dict[str, str]:
    """Map names to the exact versions that constraints.txt sets for that Python and machine."""
    chosen = {}
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment(python, machine)):
                chosen[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    return chosen


def resolve(chosen: dict[str, str], python: str, machine: str) -> list[dict[str, Any]]:
    """The metadata of every pinned package, from pip.

    Raises SystemExit when a pin has no wheel for that machine.
    """
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in GLIBCS] + [
        f"manylinux2014_{machine}",
        f"linux_{machine}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--no-deps",
            "--ignore-installed",
            "--ignore-requires-python",  # pip compares it with the Python it runs on; `conflicts` judges it
        ]
        command += [
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            "--target",
            folder,
        ]
        command += [word for platform in platforms for word in ("--platform", platform)]
        command += ["--report", str(report), *(f"{name}=={version}" for name, version in chosen.items())]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
            raise SystemExit(f"Python {python}, {machine}: {' '.join(lines) or ran.stderr}")
        return [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


def conflicts(
    metadata: list[dict[str, Any]], chosen: dict[str, str], python: str, machine: str
) -> Iterator[str]:
    """What a pinned package requires and the pins or the Python do not give."""
    for item in metadata:
        if not SpecifierSet(item.get("requires_python") or "").contains(f"{python}.20"):
            yield f"{item['name']} requires Python {item['requires_python']}"
        for text in item.get("requires_dist", []):
            need = Requirement(text)
            name = canonicalize_name(need.name)
            applies = need.marker is None or need.marker.evaluate(environment(python, machine))
            if not applies or name.startswith(FROM_TORCH):
                continue
            if name not in chosen:
                yield f"{item['name']} requires {text}, which has no pin"
            elif not need.specifier.contains(chosen[name], prereleases=True):
                yield f"{item['name']} requires {text}, but {chosen[name]} is pinned"


def main() -> None:
    """Print one line for each Python and machine; exit 1 at the first set that does not hold together."""
    for python in sys.argv[1:] or PYTHONS:
        for machine in MACHINES:
            chosen = pins(python, machine)
            found = list(conflicts(resolve(chosen, python, machine), chosen, python, machine))
            if found:
                raise SystemExit(f"Python {python}, {machine}: {'; '.join(found)}")
            sys.stdout.write(
                f"Python {python}, {machine}: {len(chosen)} pins have wheels and fit each other\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
