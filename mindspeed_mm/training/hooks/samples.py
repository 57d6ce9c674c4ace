"""Hook that generates validation videos with the model in training at each evaluation."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_mm.training.hooks.base import EvalEvent, Hook


class Samples(Hook):
    """Calls `make(iteration)`, which writes videos and returns their scores or {}, and logs the scores."""

    alike = True

    def __init__(self, make: Callable[[int], dict[str, float]]) -> None:
        self._make = make

    def on_eval(self, event: EvalEvent) -> None:
        """Generate the videos. Errors of generation are raised on every rank."""
        if scores := self._make(event.iteration):
            event.log(scores)
