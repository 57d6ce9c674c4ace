"""When a run stops before its last iteration."""

from __future__ import annotations

import time
from collections.abc import Callable

from mindspeed_mm.processes import STOP_SIGNALS, stop_signal
from mindspeed_mm.training.config import ExitConfig


class ExitWatch:
    """--exit-interval, --exit-duration-in-mins and signals.

    `local` goes into the iteration's exchange; `reason` decides.
    """

    def __init__(self, config: ExitConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock, self._start = config, clock, clock()
        self.stopped_by = 0  # the signal that `reason` ended the run for

    def local(self) -> list[float]:
        """[SIGINT, SIGTERM, SIGHUP seen here, time is up here], as numbers that ranks average."""
        minutes = (self._clock() - self._start) / 60
        limit = self._config.exit_duration_in_mins
        seen = stop_signal()
        return [
            *(float(number == seen) for number in STOP_SIGNALS),
            float(limit is not None and minutes > limit),
        ]

    def reason(self, iteration: int, anywhere: list[float]) -> str | None:
        """Why to stop after this iteration, the same on every rank; None to continue."""
        *signals, expired = anywhere
        for number, share in zip(STOP_SIGNALS, signals, strict=True):
            if share:
                self.stopped_by = number
                return f"{number.name} was received"
        if expired:
            return f"--exit-duration-in-mins {self._config.exit_duration_in_mins:g} is over"
        if self._config.exit_interval and iteration % self._config.exit_interval == 0:
            return f"--exit-interval {self._config.exit_interval} is reached"
        return None
