"""Validation videos: what the model in training generates at each evaluation."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_mm.training.hooks.base import EvalEvent, Hook


class Samples(Hook):
    """Calls `make(iteration)` → scores of the videos that it wrote, or {}."""

    alike = True

    def __init__(self, make: Callable[[int], dict[str, float]]) -> None:
        self._make = make

    def on_eval(self, event: EvalEvent) -> None:
        """Make the videos. Raises what generation raises, on every rank."""
        if scores := self._make(event.iteration):
            event.log(scores)
