"""`--help`, a typo and a missing file answer at once.

No command imports torch (or megatron.core) for them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "megatron.core", "diffusers", "transformers", "av", "decord")
RUN = """
import json, runpy, sys
target, argv = sys.argv[1], sys.argv[2:]
sys.argv = [target, *argv]
code = 0
try:
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        module, name = target.split(":")
        getattr(__import__(module, fromlist=[name]), name)()
except SystemExit as stop:
    code = stop.code or 0
heavy = [name for name in HEAVY if name in sys.modules]
sys.stderr.write("\\n" + json.dumps({"code": code, "heavy": heavy}))
"""
COMMANDS = {
    "pretrain_vace": "pretrain_vace.py",
    "pretrain_sora": "pretrain_sora.py",
    "vace": "mindspeed_mm.cli.main:main",
    "mm-convert": "checkpoint.cli:main",
    "mm-inspect": "mindspeed_mm.tools.inspect_samples:main",
    "get_vace_feature": "mindspeed_mm/tools/feature_extraction/get_vace_feature.py",
    "Wan-VACE-Inference": "examples/vace/inference/Wan-VACE-Inference.py",
}
TYPOS = {
    "pretrain_vace": ["--mirco-batch-size", "1"],
    "pretrain_sora": ["--mirco-batch-size", "1"],
    "vace": ["trian"],
    "mm-convert": ["VACEConverter", "hf_to_m", "--cfg.source_path", "a"],
    "mm-inspect": ["--no-such-flag"],
    "get_vace_feature": ["--mm-dat", "a.json"],
    "Wan-VACE-Inference": ["no-such-file.json"],
}


def run(command: str, *argv: str) -> tuple[int, list[str], str]:
    """(exit code, heavy modules that were imported, what was printed)"""
    source = RUN.replace("HEAVY", repr(HEAVY))
    ran = subprocess.run(
        [sys.executable, "-c", source, COMMANDS[command], *argv], cwd=ROOT, capture_output=True, text=True
    )
    *text, last = ran.stderr.rstrip().split("\n")
    report = json.loads(last)
    return report["code"], report["heavy"], ran.stdout + "\n".join(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_torch(command: str) -> None:
    code, heavy, text = run(command, "--help")
    assert (code, heavy) == (0, [])
    assert "usage" in text.lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_typo_is_one_line_and_exit_code_1_without_torch(command: str) -> None:
    code, heavy, text = run(command, *TYPOS[command])
    assert (code, heavy) == (1, []), text
    assert len(text.strip().splitlines()) == 1, text
    assert "Traceback" not in text


def test_parts_of_training_import_no_vae_and_no_text_encoder() -> None:
    """Training on features needs neither, and their libraries take half of a start."""
    source = "import sys, mindspeed_mm.tasks.assembly; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"diffusers", "transformers"}.isdisjoint(ran.stdout.split())
    assert "torch" in ran.stdout.split()
