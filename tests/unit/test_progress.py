"""The progress bar: a bar on a terminal, lines in a log, nothing on other ranks."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
import time

import pytest

from mindspeed_mm import progress
from mindspeed_mm.progress import Progress, size_text


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress.logger, "info", lines.append)
    monkeypatch.delenv("MINDSPEED_MM_TERMINAL", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    return lines


def test_progress_logs_a_line_every_interval(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress("clips", 10, "clip") as bar:
        for _ in range(10):
            clock[0] += 20.0
            bar.step(note="failed 1")
    assert [line.partition(" |")[0] for line in logged] == [f"clips {n}/10" for n in (2, 4, 6, 8, 10)]
    assert logged[0] == "clips 2/10 | 20.0 s/clip | ETA 0:02:40 | failed 1"


def test_progress_eta_counts_only_what_took_time(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = Progress("clips", 10, "clip", every=0.0)
    bar.step(4, worked=False)
    clock[0] = 5.0
    bar.step()
    assert logged == ["clips 4/10 | 0.00 clips/s | ETA unknown", "clips 5/10 | 5.0 s/clip | ETA 0:00:25"]


def test_progress_of_bytes_shows_sizes_and_rate(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = Progress("writing out", 34_700_000_000, "B")
    clock[0] = 40.0
    bar.step(8_000_000_000)
    assert logged == ["writing out 8.0 GB of 34.7 GB | 200 MB/s | ETA 0:02:14"]


@pytest.mark.parametrize(("steps", "lines"), [(50, [10, 20, 30, 40, 50]), (5, [1, 2, 3, 4, 5]), (2, [1, 2])])
def test_progress_logs_at_equal_shares(logged: list[str], steps: int, lines: list[int]) -> None:
    bar = Progress("a", steps, "step", lines=5)
    for _ in range(steps):
        bar.step()
    assert [int(line.split()[1].partition("/")[0]) for line in logged] == lines


def test_progress_is_silent_on_other_ranks(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    bar = Progress("a", 2, "step", every=0.0)
    bar.step()
    Progress("a", 2, "step", lines=2).step()
    assert not logged


@pytest.mark.parametrize("size", [(24, 100), (0, 0)])
def test_progress_draws_a_bar_on_the_named_terminal(
    logged: list[str], monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    monkeypatch.setenv("MINDSPEED_MM_TERMINAL", os.ttyname(theirs))
    with Progress("writing", 2_000_000, "B", every=0.0) as bar:
        bar.step(2_000_000)
    text, deadline = "", time.monotonic() + 10
    waiting = select.poll()  # select.select refuses descriptors above 1023
    waiting.register(ours, select.POLLIN)
    while "2.00M/2.00M" not in text and time.monotonic() < deadline:
        if waiting.poll(1000):
            text += os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert "writing: 100%" in text
    assert "B/s" in text
    assert not logged


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (523_000, "523 kB"),
        (34.7e9, "34.7 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_size_text_reads_like_a_size(count: float, text: str) -> None:
    assert size_text(count) == text
