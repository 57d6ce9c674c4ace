"""Selects what the screen shows of a launched run.

It shows all lines except errors, and of all errors one line, that of the first failing rank.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_ERROR = re.compile(r"\[rank (\d+)\] [A-Za-z.]*Error: ")
_FOLLOWS = re.compile(r" lost the other ranks in |, but another rank failed; ")
_BROKEN = re.compile(r"gloo/transport|NCCL|HCCL|[Cc]onnection (closed|reset|was closed)|Broken pipe|TCPStore")
_PREFIX = re.compile(r"^\[rank\d+\]:\s?")  # printed by torch's own hook
_NOISE = re.compile(
    r"\[rank\d+\]:\[[WE]\d|\[[WE]\d{3,} |frame #\d+: |terminate called after|Exception raised from "
)
_STOPPED = re.compile(r"stopped by SIG|exiting after iteration ")
_BEGINS = "Traceback (most recent call last):"
_AWAIT = 2.0  # seconds to wait for other ranks to report their errors
_FATAL = 10.0  # a rank that is still running this many seconds after a traceback has survived it


@dataclass(frozen=True, order=True)
class Failure:
    """Why the run failed. The smallest one is shown. A `weak` one only follows from that of another rank."""

    weak: bool
    rank: int
    line: str


@dataclass
class _Block:
    """The traceback of a rank, held back until it is known whether the rank continues."""

    started: float
    lines: list[str] = field(default_factory=list)
    closed: bool = False


class Screen:
    """Call `line` for output of ranks, `ended` for exit codes, and `tick` regularly. `show` prints a line."""

    def __init__(
        self, show: Callable[[str], None], log: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._show, self._log, self._clock = show, log, clock
        self._blocks: dict[int, _Block] = {}
        self._failures: list[Failure] = []
        self._shown: Failure | None = None
        self._failed_at: float | None = None
        self.stopping = False  # a signal was forwarded, so lost connections are expected
        self.logged_stop = False

    @property
    def failed_at(self) -> float | None:
        """The time of the first failure, or None."""
        return self._failed_at

    def line(self, rank: int, text: str) -> None:
        """Process a line of output of a rank."""
        plain = _PREFIX.sub("", text)
        if found := _ERROR.match(text):
            self._fail(Failure(_FOLLOWS.search(text) is not None, int(found[1]), text))
            return
        block = self._blocks.get(rank)
        if plain == _BEGINS and (block is None or not block.closed):
            block = self._blocks.setdefault(rank, _Block(self._clock()))
        if block is not None and not block.closed:
            block.lines.append(text)
            block.closed = _is_exception(plain)
            return
        if (self.stopping or self._failed_at is not None) and _NOISE.match(text):
            return
        if _STOPPED.match(text):
            if self._failed_at is not None and not self.stopping:
                return  # the launcher stopped this rank because another one failed
            if self.logged_stop and text.startswith("stopped by") and " after " not in text:
                return
            self.logged_stop = True
        self._show(text)

    def ended(self, rank: int, code: int) -> None:
        """Process the exit code of a rank that this run did not end by a signal."""
        block = self._blocks.pop(rank, None)
        if code == 0:
            self._give_out(block)
            return
        if any(failure.rank == rank for failure in self._failures):
            return
        if code < 0:
            self._fail(Failure(False, rank, _killed(rank, -code, self._log)))
        elif block is not None and not self.stopping:
            last = _PREFIX.sub("", block.lines[-1])
            # A broken connection usually follows from the end of another rank.
            is_lost = _BROKEN.search(last) is not None
            self._fail(Failure(is_lost, rank, f"[rank {rank}] {last}; the traceback is in {self._log}"))
        elif not (self.stopping and code > 128):
            self._fail(Failure(True, rank, f"rank {rank} ended with exit code {code}; see {self._log}"))

    def tick(self, *, final: bool = False) -> None:
        """Show lines that have been held back long enough, or all if `final`, when every rank has ended."""
        now = self._clock()
        for rank, block in list(self._blocks.items()):
            if not self.stopping and self._failed_at is None and (final or now - block.started > _FATAL):
                self._give_out(self._blocks.pop(rank))
        if self._failed_at is None or not (final or now - self._failed_at > _AWAIT):
            return
        best = min(self._failures)
        if best.weak and self.stopping:
            return
        if self._shown is None or (self._shown.weak and not best.weak):
            self._shown = best
            self._show(best.line)

    @property
    def failure(self) -> Failure | None:
        """The failure that determines the exit code, or None if there is none or the run was only stopped."""
        best = min(self._failures, default=None)
        return None if best is None or (best.weak and self.stopping) else best

    def _fail(self, failure: Failure) -> None:
        self._failures.append(failure)
        if self._failed_at is None:
            self._failed_at = self._clock()

    def _give_out(self, block: _Block | None) -> None:
        for line in block.lines if block is not None else ():
            self._show(line)


def _is_exception(line: str) -> bool:
    """Return whether a line is the last of a traceback.

    Examples: `ValueError: …`, `torch.OutOfMemoryError: …`, `KeyboardInterrupt`.
    """
    return bool(re.match(r"[A-Za-z_][\w.]*(: |$)", line)) and not line.startswith("Traceback")


def _killed(rank: int, number: int, log: str) -> str:
    known = {member.value: member.name for member in signal.Signals}
    name = known.get(number, f"signal {number}")
    if number == signal.SIGKILL:
        return (
            f"rank {rank} was killed by {name}; out of memory? Look for its process in `dmesg`, and see {log}"
        )
    return f"rank {rank} was killed by {name}; see {log}"
