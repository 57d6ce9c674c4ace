"""Of what all ranks print, the screen shows every line but errors, and of errors one line."""

from __future__ import annotations

import signal

import pytest

from mindspeed_mm.tools.elapsed import elapsed_line
from mindspeed_mm.tools.screen import Screen
from tests.support.errors import names

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in f',
    "    f()",
    "ValueError: odd",
]


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def screen() -> tuple[Screen, list[str], Clock]:
    shown: list[str] = []
    clock = Clock()
    return Screen(shown.append, "run.log", clock), shown, clock


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (["one", "two"], ["one", "two"]),
        (["[rank 1] WeightsError: b", "[rank 0] WeightsError: a"], ["[rank 0] WeightsError: a"]),
        (
            [
                "[rank 0] LaunchError: rank 0 of 2: lost the other ranks in iteration 3",
                "[rank 1] DataError: clip 7",
            ],
            ["[rank 1] DataError: clip 7"],
        ),
        (["[rank 0] LaunchError: rank 0 of 2: lost the other ranks in iteration 3"], None),
        (
            [
                "[rank 0] LaunchError: rank 0: made its videos, but another rank failed; look",
                "[rank 1] DataError: b",
            ],
            ["[rank 1] DataError: b"],
        ),
    ],
)
def test_lowest_rank_without_lost_peers_is_shown(said: list[str], wanted: list[str] | None) -> None:
    view, shown, _ = screen()
    for line in said:
        view.line(0, line)
    view.tick(final=True)
    assert shown == (said if wanted is None else wanted)


def test_error_is_shown_while_other_ranks_hang() -> None:
    view, shown, clock = screen()
    view.line(1, "[rank 1] DataError: clip 7")
    view.tick()
    assert shown == []
    clock.now = 3.0
    view.tick()
    view.line(0, "late")
    view.tick(final=True)
    assert shown == ["[rank 1] DataError: clip 7", "late"]


@pytest.mark.parametrize("prefix", ["", "[rank1]: "])
def test_traceback_that_ends_a_rank_is_its_last_line(prefix: str) -> None:
    view, shown, _ = screen()
    for line in TRACEBACK:
        view.line(1, prefix + line)
    view.line(0, "[rank 0] LaunchError: rank 0 of 2: lost the other ranks in iteration 3")
    view.ended(1, 1)
    view.ended(0, 1)
    view.tick(final=True)
    assert shown == ["[rank 1] ValueError: odd; the traceback is in run.log"]
    assert view.failure is not None


def test_traceback_of_a_running_rank_is_shown() -> None:
    view, shown, clock = screen()
    for line in TRACEBACK:
        view.line(1, line)
    view.line(1, "on it goes")
    clock.now = 11.0
    view.tick()
    assert shown == ["on it goes", *TRACEBACK]
    assert view.failure is None


@pytest.mark.parametrize(("number", "hint"), [(signal.SIGKILL, "dmesg"), (signal.SIGSEGV, "run.log")])
def test_killed_rank_is_one_line(number: signal.Signals, hint: str) -> None:
    view, shown, _ = screen()
    view.line(0, "[rank 0] LaunchError: rank 0 of 2: lost the other ranks in iteration 3")
    view.ended(3, -number)
    view.ended(0, 1)
    view.tick(final=True)
    (line,) = shown
    assert line.startswith("rank 3 ")
    assert names(line, number.name, hint)


def test_rank_killed_by_a_signal_without_a_name_is_one_line() -> None:
    view, shown, _ = screen()
    view.ended(1, -40)
    view.tick(final=True)
    (line,) = shown
    assert "rank 1" in line
    assert "40" in line


def test_ranks_that_end_after_a_failure_report_no_stop() -> None:
    view, shown, _ = screen()
    view.ended(0, -signal.SIGKILL)
    view.tick()
    view.line(1, "stopped by SIGTERM after 3 of 8 clips")
    view.line(1, "stopped by SIGTERM")
    view.tick(final=True)
    (line,) = shown
    assert line.startswith("rank 0 ")
    assert names(line, "SIGKILL")


def test_broken_connection_yields_to_the_killed_rank() -> None:
    view, shown, _ = screen()
    broken = (
        "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    )
    for line in (*TRACEBACK[:-1], broken):
        view.line(0, line)
    view.ended(0, 1)
    view.ended(1, -signal.SIGKILL)
    view.tick(final=True)
    (line,) = shown
    assert line.startswith("rank 1 ")
    assert names(line, "SIGKILL")


def test_rank_that_ends_without_a_word_names_its_exit_code() -> None:
    view, shown, _ = screen()
    view.ended(2, 7)
    view.tick(final=True)
    (line,) = shown
    assert "rank 2" in line
    assert "exit code 7" in line


def test_stopped_run_shows_no_traceback_and_no_loss() -> None:
    view, shown, _ = screen()
    view.stopping = True
    for line in (
        *TRACEBACK,
        "[rank 1] LaunchError: rank 1 of 2: lost the other ranks in iteration 3",
        "[W1128 a.cpp:1] b",
    ):
        view.line(1, line)
    view.line(0, "exiting after iteration 2: SIGTERM was received")
    view.ended(1, 1)
    view.ended(0, 143)
    view.tick(final=True)
    assert shown == ["exiting after iteration 2: SIGTERM was received"]
    assert view.failure is None


def test_elapsed_time_is_the_mean_of_the_second_hundred(tmp_path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "".join(f" iteration {n} | elapsed time per iteration (ms): {n}.0 | x\n" for n in range(1, 251))
    )
    assert elapsed_line(log, 2) == "Elapsed Time Per iteration: 150.5, Average Samples per Second: 13.289"
    log.write_text(" | elapsed time per iteration (ms): 10.0 |\n | elapsed time per iteration (ms): 20.0 |\n")
    assert elapsed_line(log, 3) == "Elapsed Time Per iteration: 15.0, Average Samples per Second: 200.000"
    log.write_text("nothing\n")
    assert "no iteration" in elapsed_line(log, 3)
    assert elapsed_line(log, 3, expected=False) == ""
