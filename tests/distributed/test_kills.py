"""Whatever ends a process of a run ends the run.

Within ten seconds nothing of it is left, and one line says why.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from mindspeed_mm.data.video_writer import write_video
from tests.support.clips import numbered
from tests.support.errors import names
from tests.support.extract_job import make_job
from tests.support.runs import make_run
from tests.support.runs_killed import ROOT, Started, extract, generate, gone, train
from tests.support.tiny import tiny_transformer, write_official, write_transformer

pytestmark = pytest.mark.slow


def the_launcher(run: Started) -> None:
    """The script's own process, which the launcher has taken over."""
    os.kill(run.process.pid, signal.SIGKILL)


def its_group(run: Started) -> None:
    os.killpg(run.process.pid, signal.SIGKILL)


def a_rank(run: Started) -> None:
    os.kill(run.ranks()[1], signal.SIGKILL)


def a_reader(run: Started) -> None:
    readers = [child.pid for child in psutil.Process(run.ranks()[1]).children(recursive=True)]
    os.kill(readers[-1], signal.SIGKILL)


def errors(run: Started) -> list[str]:
    """What was printed after the last line of progress."""
    return [line for line in run.lines if "Error" in line or "killed" in line or "Traceback" in line]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_run(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize(
    ("kill", "said"),
    [
        (the_launcher, None),
        (its_group, None),
        (a_rank, ("rank 1", "SIGKILL")),
        (a_reader, ("data worker",)),
    ],
)
def test_training_ends_with_any_of_its_processes(
    tmp_path: Path, files: dict[str, str], kill: Callable[[Started], None], said: tuple[str, ...] | None
) -> None:
    run = train(tmp_path, files)
    tree = run.tree
    assert len(tree) >= 5  # the launcher, two ranks, a data worker each
    kill(run)
    assert gone(list(tree)), tree
    code = run.end()
    assert "Elapsed Time" not in run.said
    if said is not None:
        assert code == 1
        (line,) = errors(run)
        assert names(line, *said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_training_saves_when_it_is_stopped(
    tmp_path: Path, files: dict[str, str], number: signal.Signals
) -> None:
    run = train(tmp_path, files)
    tree = run.tree
    os.kill(run.process.pid, number)
    code = run.end(120)
    assert gone(list(tree)), tree
    assert code == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert not errors(run)
    iteration = int((tmp_path / "save/latest_checkpointed_iteration.txt").read_text())
    assert (tmp_path / f"save/iter_{iteration:07d}/.metadata").is_file()
    assert run.lines[-1] == f"exiting after iteration {iteration}: {number.name} was received"


def test_second_ctrl_c_kills_the_ranks(tmp_path: Path, files: dict[str, str]) -> None:
    run = train(tmp_path, files)
    tree = run.tree
    for rank in run.ranks():
        os.kill(rank, signal.SIGSTOP)  # they hear nothing
    os.kill(run.process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(2)
    os.kill(run.process.pid, signal.SIGINT)
    assert gone(list(tree)), tree
    assert run.end() == -signal.SIGINT


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    write_official(folder / "tiny", dtype=torch.float32)
    values = {
        "model": {"transformer": "tiny", "vae": "tiny", "text_encoder": "tiny"},
        **{
            "prompt": "a red ball",
            "height": 64,
            "width": 96,
            "num_frames": 17,
            "steps": 1000,
            "dtype": "fp32",
        },
        "output_path": str(folder / "out"),
    }
    (folder / "inference.json").write_text(json.dumps(values))
    return folder / "inference.json"


@pytest.mark.parametrize(
    ("ranks", "number", "code"), [(2, signal.SIGINT, -2), (0, signal.SIGTERM, 143), (0, signal.SIGHUP, 129)]
)
def test_generation_stops_and_leaves_nothing(
    tmp_path: Path, inference: Path, ranks: int, number: signal.Signals, code: int
) -> None:
    run = generate(tmp_path, inference, ranks)
    tree = run.tree
    os.kill(run.process.pid, number)
    assert gone(list(tree), 20), tree
    assert run.end() == code
    assert not errors(run)
    assert sum("stopped by" in line for line in run.lines) == 1
    assert not list(tmp_path.glob("out/**/*.mp4"))
    assert not list(tmp_path.glob("out/**/*.tmp"))


@pytest.mark.parametrize(("kill", "reported"), [(the_launcher, None), (a_rank, ("rank 1", "SIGKILL"))])
def test_generation_ends_with_any_of_its_processes(
    tmp_path: Path, inference: Path, kill: Callable[[Started], None], reported: tuple[str, ...] | None
) -> None:
    run = generate(tmp_path, inference)
    tree = run.tree
    kill(run)
    assert gone(list(tree)), tree
    run.end()
    if reported is not None:
        (line,) = errors(run)
        assert names(line, *reported)


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An extraction job of many clips, each of them work."""
    root = tmp_path_factory.mktemp("extraction")
    make_job(root, max_hxw=36864)
    folder = root / "clips datası"
    clips = [write_video(folder / f"{n}.mp4", numbered(9, 192, 192, first=5 * n), 16) for n in range(24)]
    rows = [{"video": clip.name, "cap": f"clip {number}"} for number, clip in enumerate(clips)]
    (folder / "data.json").write_text(json.dumps(rows))
    return root


@pytest.mark.parametrize("kill", [the_launcher, a_rank, a_reader])
def test_extraction_ends_with_any_of_its_processes(
    tmp_path: Path, footage: Path, kill: Callable[[Started], None]
) -> None:
    for name in ("data.json", "model.json"):
        shutil.copy(footage / name, tmp_path)
    run = extract(tmp_path)
    tree = run.tree
    kill(run)
    if kill is a_reader:  # costs one clip, which is named: without --skip-bad-samples the run ends
        assert run.end(120) == 1
        assert sum("Error" in line for line in run.lines) == 1
    assert gone(list(tree)), tree
    run.end()
    assert "Traceback" not in run.said


SLOW = """
import sys, time
from mindspeed_mm.progress import Progress
original = Progress.step
def step(self, *args, **kwargs):
    sys.stdout.write("step\\n"); sys.stdout.flush(); time.sleep(0.05)
    return original(self, *args, **kwargs)
Progress.step = step
from checkpoint.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_conversion_leaves_the_target_as_it_was(tmp_path: Path, number: signal.Signals) -> None:
    write_transformer(tmp_path / "a", tiny_transformer(), torch.float32)
    flags = ["--cfg.source_path", str(tmp_path / "a"), "--cfg.target_path", str(tmp_path / "b")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "VACEConverter", "hf_to_mm", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "step\n":
        assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    (line,) = [line for line in said.splitlines() if "stopped by" in line]
    assert number.name in line
    assert "Traceback" not in said
    assert not list(tmp_path.glob("b*"))
    assert not list(tmp_path.glob(".*"))
