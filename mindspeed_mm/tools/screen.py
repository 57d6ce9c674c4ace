"""What the screen shows of a launched run.

All lines except errors; of all errors one line, that of the first failing rank.
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
_AWAIT = 2.0  # seconds in which other ranks may report the same error
_FATAL = 10.0  # seconds after a traceback within which its rank ends if the traceback is the cause


@dataclass(frozen=True, order=True)
class Failure:
    """Why the run failed; the smallest one is shown. `weak`: it only follows from another rank's failure."""

    weak: bool
    rank: int
    line: str


@dataclass
class _Block:
    """The traceback of a rank, held back until it is clear whether the rank continues."""

    started: float
    lines: list[str] = field(default_factory=list)
    closed: bool = False


class Screen:
    """`show` prints a line. Call `line` for output of ranks, `ended` for exit codes, and `tick` regularly."""

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
        """Time of the first failure; None while there is none."""
        return self._failed_at

    def line(self, rank: int, text: str) -> None:
        """Take one line of output of a rank."""
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
                return  # the launcher stops the other ranks after a failure
            if self.logged_stop and text.startswith("stopped by") and " after " not in text:
                return
            self.logged_stop = True
        self._show(text)

    def ended(self, rank: int, code: int) -> None:
        """Take the exit code of a rank that ended by itself, or by a signal that this run did not send."""
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
            is_lost = (
                _BROKEN.search(last) is not None
            )  # a broken connection usually follows from the end of another rank
            self._fail(Failure(is_lost, rank, f"[rank {rank}] {last}; the traceback is in {self._log}"))
        elif not (self.stopping and code > 128):
            self._fail(Failure(True, rank, f"rank {rank} ended with exit code {code}; see {self._log}"))

    def tick(self, *, final: bool = False) -> None:
        """Show lines that have waited long enough; `final`: every rank has ended."""
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
        """The failure that decides the exit code; None if the run was only stopped."""
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
    """Whether a line of a traceback is its last.

    `ValueError: …`, `torch.OutOfMemoryError: …`, `KeyboardInterrupt`.
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
