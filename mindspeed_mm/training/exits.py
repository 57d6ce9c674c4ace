"""Conditions that stop a run before its last iteration."""

from __future__ import annotations

import time
from collections.abc import Callable

from mindspeed_mm.processes import STOP_SIGNALS, stop_signal
from mindspeed_mm.training.config import ExitConfig


class ExitWatch:
    """Watches --exit-interval, --exit-duration-in-mins and signals.

    The ranks average the results of `local` once per iteration, and `reason` decides from these means.
    """

    def __init__(self, config: ExitConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock, self._start = config, clock, clock()
        self.stopped_by = 0  # the signal that ended the run

    def local(self) -> list[float]:
        """Return this rank's flags [SIGINT, SIGTERM, SIGHUP, time is up] as numbers to average over ranks."""
        minutes = (self._clock() - self._start) / 60
        limit = self._config.exit_duration_in_mins
        seen = stop_signal()
        return [
            *(float(number == seen) for number in STOP_SIGNALS),
            float(limit is not None and minutes > limit),
        ]

    def reason(self, iteration: int, anywhere: list[float]) -> str | None:
        """Return why to stop after this iteration, or None to continue. The same on every rank."""
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
