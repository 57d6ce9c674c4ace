"""Run the quickstart once for all tests here: interrupted when training starts, then run again to the end.

Both runs do every default step, with one process, few clips and few iterations: together three minutes on one
core. tests/distributed and the script tests run each of the commands on two processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "outputs" / "quickstart"
ITERATIONS = 80  # with fewer, the scores come close to their bounds
FEWER = {"CLIPS": "3", "TRAIN_ITERS": str(ITERATIONS), "NPUS_PER_NODE": "1"}


@dataclass(frozen=True)
class Quickstart:
    """How the two runs went."""

    interrupted: str  # output of the first run until it was stopped
    printed: str  # output of the second run
    out: Path


@pytest.fixture(scope="session")
def quickstart() -> Quickstart:
    """What `bash examples/vace/quickstart.sh` left behind."""
    interrupted = interrupt_at("[4/7]")
    ran = subprocess.run(
        ["bash", "examples/vace/quickstart.sh"],
        cwd=ROOT,
        env={**os.environ, **FEWER},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    return Quickstart(interrupted, ran.stdout, OUT)


def interrupt_at(step: str) -> str:
    """Start the quickstart and press Ctrl-C (a signal to its process group) as soon as `step` begins."""
    process = subprocess.Popen(
        ["bash", "examples/vace/quickstart.sh"],
        cwd=ROOT,
        env={**os.environ, **FEWER, "CLIPS": "1", "SCENES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C, and so do their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith(step):
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0, "an interrupted run must not look like a finished one"
    return printed
