"""benchmarks/encode.py and benchmarks/generate.py run, and print both sides and their ratio."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.support.runs import ended

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(program: str, *argv: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / program), *argv]
    env = {"PYTHONPATH": str(ROOT), "MINDSPEED_MM_DEVICE": "cpu"}
    done = ended(command, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encode_compares_every_kind_and_their_mixture() -> None:
    size = ["--frames", "5", "--height", "64", "--width", "64"]
    found = json.loads(
        run("encode.py", *size, "--clips", "1", "--rounds", "2", "--warm-up", "0", "--device", "cpu")
    )
    kinds = [found[kind] for kind in ("plain", "control", "inpaint")]
    assert [kind["clips"] for kind in (*kinds, found["mixture"])] == [1, 1, 1, 3]
    for part in (*kinds, found["mixture"]):
        assert len(part["ratio_of_each_round"]) == 2
        speeds = part["ours_clips_per_second"], part["plain_loop_clips_per_second"]
        assert min(*speeds, part["ratio"]) > 0
        assert part["plain_loop_seconds_per_clip"].keys() == {"read", "vae", "text", "write"}
    seconds = sum(1 / kind["plain_loop_clips_per_second"] for kind in kinds)
    assert 3 / found["mixture"]["plain_loop_clips_per_second"] == pytest.approx(seconds, rel=0.01)


def test_generate_compares_the_same_latents_in_time_and_memory(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, which need not import everything again; for the memory it starts itself twice."""
    size = ["--size", "tiny", "--frames", "5", "--height", "64", "--width", "64"]
    program = str(ROOT / "benchmarks/generate.py")
    monkeypatch.setattr(sys, "argv", [program, *size, "--steps", "2", "--repeats", "1"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    runpy.run_path(program, run_name="__main__")
    printed = capfd.readouterr().out
    difference = re.search(r"largest difference of the latents: (\S+)", printed)
    assert difference
    assert float(difference[1]) < 1e-4
    table = re.findall(r"\| (.+ \(\w+\)) \| (\S+) \| (\S+) \| (\S+) \|", printed)
    rows = {name: tuple(map(float, numbers)) for name, *numbers in table}
    assert rows.keys() == {
        "denoising step (s)",
        "VAE encode (s)",
        "VAE decode (s)",
        "whole video (s)",
        "peak memory (GB)",
    }
    assert all(ours > 0 and theirs > 0 for ours, theirs, _ in rows.values())
