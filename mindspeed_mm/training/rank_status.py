"""Coordinates errors and stops over ranks, and explains lost processes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mindspeed_mm.distributed.launch import gather_objects, raise_on_all_ranks
from mindspeed_mm.errors import DataError, LaunchError, MindSpeedMMError
from mindspeed_mm.log import rank, world_size

_LOST = re.compile(r"timed? ?out|connection (closed|reset|refused)|watchdog|broken pipe", re.IGNORECASE)


@dataclass
class RankStatus:
    """The pending error or stop of this rank, which ranks share once per iteration.

    A rank that raised or stopped alone would leave the others waiting in a collective until it times out.
    """

    error: MindSpeedMMError | None = None
    stop: str = ""  # reason to save and stop
    # Whether any rank had an error or a stop at the last reduction; equal on all ranks.
    anywhere: bool = False

    def fail(self, error: MindSpeedMMError) -> None:
        """Record an error; only the first is kept. In a run with one rank, it takes effect immediately."""
        self.error = self.error or error
        self.anywhere = self.anywhere or world_size() == 1

    def request_stop(self, reason: str) -> None:
        """Request a stop; only the first reason is kept."""
        self.stop = self.stop or reason

    @property
    def flag(self) -> float:
        """1.0 if this rank has an error or a stop, else 0.0, for the reduction over ranks."""
        return float(self.error is not None or bool(self.stop))

    def raise_together(self) -> None:
        """Raise the first rank's error on all ranks. A collective."""
        raise_on_all_ranks(self._raise)

    def reason(self) -> str | None:
        """Return why to stop, or None, the same on every rank. Uses a collective if `anywhere` is set."""
        return next(filter(None, gather_objects(self.stop)), None) if self.anywhere else None

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


def dead_worker(error: RuntimeError, iteration: int) -> DataError | None:
    """Return a DataError if `error` reports that a data worker died, else None."""
    if "DataLoader worker" not in str(error):
        return None
    return DataError(
        f"a data worker died in iteration {iteration}: {_first_line(error)}",
        where=f"rank {rank()}",
        fix="lower --num-workers if memory ran out (`dmesg`)",
    )


def lost_process(error: RuntimeError, iteration: int, phase: str) -> MindSpeedMMError | None:
    """Return the error to raise if `error` reports a dead data worker or lost ranks, else None."""
    if died := dead_worker(error, iteration):  # torch reports a dead worker in whichever phase is running
        return died
    if not _LOST.search(str(error)):  # process-group errors are plain RuntimeErrors too
        return None
    return LaunchError(
        f"lost the other ranks in iteration {iteration}, phase {phase}: {_first_line(error)}",
        where=f"rank {rank()} of {world_size()}",
        fix="look for the first error in the log, or raise --distributed-timeout-minutes",
    )


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]
