"""Running commands that tests kill.

Training, extraction and generation on two ranks each, conversion in one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.runs import alive

ROOT = Path(__file__).resolve().parents[2]
VACE = ROOT / "examples/vace"


@dataclass
class Started:
    """A running command in its own session."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, text: str, seconds: float = 240) -> None:
        """Until a line with `text` was printed."""
        deadline = time.monotonic() + seconds
        while not any(text in line for line in list(self.lines)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("\n".join([f"no {text!r} was printed:", *self.lines]))
            time.sleep(0.05)

    @property
    def tree(self) -> dict[int, str]:
        """Map process ids to command lines, for the command and all its descendants."""
        found = {}
        top = psutil.Process(self.process.pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                found[process.pid] = " ".join(process.cmdline())
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [process.pid for process in psutil.Process(self.process.pid).children()]

    def end(self, seconds: float = 60) -> int:
        """Wait for the exit code, and for all that was printed."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    @property
    def said(self) -> str:
        """All that was printed so far."""
        return "\n".join(self.lines)


def start(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Started:
    """Start a command with these variables more."""
    return Started(
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MINDSPEED_MM_DEVICE": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    )


def gone(pids: Sequence[int], seconds: float = 10.0) -> bool:
    """Whether none of the processes is left after so many seconds; whatever is left is killed."""
    left = alive(pids, seconds)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    return not left


def train(root: Path, files: Mapping[str, str], **environment: str) -> Started:
    """Training without an end on two ranks, each with a data worker; its second iteration is over."""
    settings = {"NPUS_PER_NODE": "2", "TRAIN_ITERS": "1000000", "SAVE_INTERVAL": "1000000"}
    paths = {"SAVE_PATH": str(root / "save"), "LOG_DIR": str(root / "logs"), "NUM_WORKERS": "1"}
    run = start(
        ["bash", str(VACE / "14B/pretrain_fsdp.sh")], root, {**files, **settings, **paths, **environment}
    )
    run.wait_for(" iteration        2/")
    return run


def generate(root: Path, config: Path, ranks: int = 2) -> Started:
    """Generation on `ranks` processes, or without a launcher for 0; it denoises."""
    arguments = [str(config), "--output-path", str(root / "out")]
    if ranks:
        environment = {"NPUS_PER_NODE": str(ranks), "LOG_DIR": str(root / "logs")}
        run = start(["bash", str(VACE / "inference/generate.sh"), *arguments], root, environment)
    else:
        run = start([sys.executable, str(VACE / "inference/Wan-VACE-Inference.py"), *arguments], root, {})
    run.wait_for("denoising")
    return run


def extract(root: Path, ranks: int = 2) -> Started:
    """Extraction of `make_job`'s files on `ranks` processes, each with a reading process.

    Two features are written.
    """
    environment = {
        "MM_DATA": str(root / "data.json"),
        "MM_MODEL": str(root / "model.json"),
        "LOG_DIR": str(root / "logs"),
        "NPUS_PER_NODE": str(ranks),
        "NUM_WORKERS": "1",
    }
    script = VACE / "feature_extract/feature_extraction.sh"
    run = start(["bash", str(script), "--save-path", str(root / "out")], ROOT, environment)
    deadline = time.monotonic() + 240
    while len(list(root.glob("out/features/*.safetensors"))) < 2:
        if run.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(run.said)
        time.sleep(0.05)
    return run
