"""metrics.jsonl over the stops and starts of one run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mindspeed_mm.errors import TrainingError
from mindspeed_mm.files import open_append
from mindspeed_mm.training.hooks.metric_writers import JsonLines
from tests.support.errors import raises


def write(path: Path, iterations: range, resumed: int) -> None:
    lines = JsonLines(path, resumed)
    for iteration in iterations:
        lines.write(iteration, {"loss": float(iteration)})
        if iteration % 2 == 0:
            lines.write(iteration, {"validation/loss": 0.5})
    lines.close()


def iterations(path: Path, key: str = "loss") -> list[int]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["iteration"] for row in rows if key in row]


def test_metrics_hold_each_iteration_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8), resumed=0)
    write(path, range(5, 10), resumed=4)
    assert iterations(path) == list(range(1, 10))
    assert iterations(path, "validation/loss") == [2, 4, 6, 8]


def test_metrics_drop_a_line_cut_off_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5), resumed=0)
    with path.open("a") as file:
        file.write('{"iteration": 5, "lo')
    write(path, range(5, 7), resumed=4)
    assert iterations(path) == list(range(1, 7))


def test_metrics_keep_lines_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('# a note\n{"iteration": 1, "loss": 1.0}\n{"iteration": 9, "loss": 1.0}\n')
    JsonLines(path, 1).close()
    assert path.read_text() == '# a note\n{"iteration": 1, "loss": 1.0}\n'


def test_metrics_of_an_earlier_run_are_set_aside_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        write(path, range(1, 4), resumed=0)
    write(path, range(1, 3), resumed=0)
    assert iterations(path) == [1, 2]
    assert iterations(tmp_path / "metrics.before-1.jsonl") == [1, 2, 3]
    assert iterations(tmp_path / "metrics.before-2.jsonl") == [1, 2, 3]


@pytest.mark.timeout(10)
def test_metrics_that_are_a_fifo_are_rejected_immediately(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with raises(TrainingError, "regular file", where=tmp_path / "metrics.jsonl"):
        JsonLines(tmp_path / "metrics.jsonl")


@pytest.mark.timeout(10)
def test_fifo_takes_no_appended_line_with_or_without_reader(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    os.mkfifo(path)
    with pytest.raises(OSError, match=r"regular|No such device"):
        open_append(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="regular"):
        open_append(path)
    os.close(reader)
    with open_append(tmp_path / "new") as file:
        file.write(b"a\n")
    with open_append(tmp_path / "new") as file:
        file.write(b"b\n")
    assert (tmp_path / "new").read_bytes() == b"a\nb\n"
