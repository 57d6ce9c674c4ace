"""Hook that reports finished iterations to a function, such as the profiler of tools.json."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_mm.training.hooks.base import Hook, StepEvent


class Observer(Hook):
    """Calls `observe(iteration)` after each iteration."""

    def __init__(self, observe: Callable[[int], None]) -> None:
        self._observe = observe

    def on_step(self, event: StepEvent) -> None:
        """Call `observe` with the number of the finished iteration."""
        self._observe(event.report.iteration)
