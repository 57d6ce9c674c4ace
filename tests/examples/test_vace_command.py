"""`vace` on several processes, as a user types it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.support.errors import meant
from tests.support.runs import ended, make_run

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/vace/tiny"
VACE = [sys.executable, str(ROOT / "mindspeed_mm/cli/__main__.py")]


def test_vace_train_runs_on_two_processes_and_reports_speed(tmp_path: Path) -> None:
    files = make_run(tmp_path / "with spaces")
    argv = [
        "train",
        "--nproc",
        "2",
        "--global-batch-size",
        "2",
        "--train-iters",
        "2",
        "--lr",
        "1e-3",
        "--save",
        "save",
    ]
    argv += ["--config", files["MM_DATA"], files["MM_MODEL"], files["FSDP2_CONFIG"], "--log-interval=1"]
    ran = ended([*VACE, *argv, "--set", "model.caption_dropout=0.5"], cwd=tmp_path, env={}, seconds=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^Elapsed Time Per iteration: [0-9.]+, Average", ran.stdout, re.MULTILINE)
    assert '"caption_dropout": 0.5' in (tmp_path / "save/job.json").read_text()
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert len(list((tmp_path / "logs").glob("train_*.log"))) == 1


def test_vace_names_a_mistake_once_for_all_processes(tmp_path: Path) -> None:
    argv = ["generate", str(TINY / "inference.json"), "--prompt", "x", "--nproc", "2", "--set", "sed=3"]
    ran = ended([*VACE, *argv], cwd=tmp_path, env={}, seconds=60)
    assert (ran.returncode, ran.stderr.count("\n"), ran.stdout) == (1, 1, "")
    assert meant("seed") in ran.stderr
