"""What a rank must not do alone: raise an error, or stop. And how lost processes are named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mindspeed_mm.distributed.launch import gather_objects, raise_on_all_ranks
from mindspeed_mm.errors import DataError, LaunchError, MindSpeedMMError
from mindspeed_mm.log import rank, world_size

_LOST = re.compile(r"timed? ?out|connection (closed|reset|refused)|watchdog|broken pipe", re.IGNORECASE)


@dataclass
class RankStatus:
    """What this rank tells the others in the exchange of an iteration.

    A rank that raised or stopped alone would leave the others in a collective until it times out.
    """

    error: MindSpeedMMError | None = None
    stop: str = ""  # why to save and stop
    anywhere: bool = False  # whether a rank has one of these, as of the last exchange: the same on every rank

    def fail(self, error: MindSpeedMMError) -> None:
        """Keep the first error. A rank that is alone needs no exchange."""
        self.error = self.error or error
        self.anywhere = self.anywhere or world_size() == 1

    def request_stop(self, reason: str) -> None:
        """Keep the first reason."""
        self.stop = self.stop or reason

    @property
    def flag(self) -> float:
        """1 where this rank has something to tell, for the exchange."""
        return float(self.error is not None or bool(self.stop))

    def raise_together(self) -> None:
        """Raise the first rank's error on all ranks. A collective."""
        raise_on_all_ranks(self._raise)

    def reason(self) -> str | None:
        """Why to stop, the same on every rank. A collective, where `anywhere`."""
        return next(filter(None, gather_objects(self.stop)), None) if self.anywhere else None

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error


def dead_worker(error: RuntimeError, iteration: int) -> DataError | None:
    """The DataError of a data worker that ended; None for any other error of torch."""
    if "DataLoader worker" not in str(error):
        return None
    return DataError(
        f"a data worker died in iteration {iteration}: {_first_line(error)}",
        where=f"rank {rank()}",
        fix="lower --num-workers if memory ran out (`dmesg`)",
    )


def lost_process(error: RuntimeError, iteration: int, phase: str) -> MindSpeedMMError | None:
    """The error of a data worker or of ranks that are gone; None for any other error of torch."""
    if died := dead_worker(error, iteration):  # its signal arrives in any phase
        return died
    if not _LOST.search(str(error)):  # torch's errors of process groups are RuntimeErrors, too
        return None
    return LaunchError(
        f"lost the other ranks in iteration {iteration}, phase {phase}: {_first_line(error)}",
        where=f"rank {rank()} of {world_size()}",
        fix="look for the first error in the log, or raise --distributed-timeout-minutes",
    )


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]
