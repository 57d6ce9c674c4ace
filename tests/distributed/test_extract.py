"""Two and three ranks write the files, byte for byte, that one rank writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.extract_job import make_job
from tests.support.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "mindspeed_mm/tools/feature_extraction/get_vace_feature.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("extract")


@pytest.fixture(scope="module")
def flags(root):
    return [*make_job(root), "--num-workers", "1", "--no-check-clips"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MINDSPEED_MM_DEVICE": "cpu"}


def torchrun(flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, SCRIPT, *flags]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(ranks, flags, out):
    """What torchrun starts, without torchrun: ranks that have imported everything already."""
    printed = out.parent / f"printed by {out.name}"
    ran = run_ranks("mindspeed_mm.tasks.extract", [*flags, "--save-path", out], printed, ranks=ranks)
    assert ran.returncodes == [0] * ranks, ran.stdout + ran.stderr
    return ran.stdout


def contents(out):
    names = ["data.jsonl", "null_prompt.safetensors"]
    files = [*sorted((out / "features").glob("*")), *(out / name for name in names)]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def alone(root, flags):
    run(1, flags, root / "1")
    return contents(root / "1")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_more_ranks_write_the_same_bytes(root, flags, alone, ranks):
    out = root / str(ranks)
    said = torchrun([*flags, "--save-path", str(out)]) if ranks == 2 else run(ranks, flags, out)
    assert contents(out) == alone
    assert len(alone) == 6 + 2
    assert said.count("extracted 6 clips") == 1


@pytest.mark.slow
def test_killed_extraction_resumes_to_the_same_bytes(root, flags, alone):
    out = root / "killed"
    started = subprocess.Popen(
        [sys.executable, SCRIPT, *flags, "--save-path", str(out)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while (
        not list(out.glob("features/*.safetensors"))
        and time.monotonic() < deadline
        and started.poll() is None
    ):
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    survivors = {path.name: path.stat().st_mtime_ns for path in out.glob("features/*.safetensors")}
    assert survivors
    said = run(2, flags, out)
    assert f"{len(survivors)} already existed" in said
    assert {name: (out / "features" / name).stat().st_mtime_ns for name in survivors} == survivors
    finished = {name: data for name, data in contents(out).items() if not Path(name).name.startswith(".")}
    assert finished == alone
    assert len(json.loads((out / "job.json").read_text())) > 0
