"""Timers for the phases of an iteration.

On an accelerator, events are recorded in the stream, so measuring does not stall the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "communication", "optimizer")


class PhaseTimers:
    """Adds up the seconds of each phase of one iteration. `take` returns and clears them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: list[tuple[str, float]] = []
        self._events: list[tuple[str, Any, Any]] = []
        self.current = "start"  # the phase entered last, for error messages

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`: host time for data, device time for all other phases."""
        self.current = name
        if self._device.type == "cpu" or name == "data":
            start = time.perf_counter()
            yield
            self._host.append((name, time.perf_counter() - start))
            return
        start_event, end_event = self._event(), self._event()
        start_event.record()
        yield
        end_event.record()
        self._events.append((name, start_event, end_event))

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call.

        Call this method after the device has finished the iteration.
        """
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, duration in self._host:
            seconds[name] += duration
        for name, start, end in self._events:
            end.synchronize()
            seconds[name] += start.elapsed_time(end) / 1000
        self._host.clear()
        self._events.clear()
        return seconds

    def _event(self) -> Any:
        return torch.get_device_module(self._device).Event(enable_timing=True)
