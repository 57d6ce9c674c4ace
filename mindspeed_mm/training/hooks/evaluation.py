"""Hook that measures the held-out loss at --eval-interval."""

from __future__ import annotations

from collections.abc import Callable

from mindspeed_mm.log import get_logger
from mindspeed_mm.training.hooks.base import EvalEvent, Hook
from mindspeed_mm.training.validation import HIGH, LOW

logger = get_logger(__name__)


class Evaluation(Hook):
    """Logs the results of `measure()`, which runs on all ranks together."""

    alike = True

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        self._measure = measure

    def on_eval(self, event: EvalEvent) -> None:
        """Measure and log. If one rank cannot read a record, raises DataError on every rank."""
        values = self._measure()
        whole, by_task = held_out_lines(values)
        logger.info(f" validation loss at iteration {event.iteration} | {whole} |")
        if by_task:
            logger.info(f" validation loss of each task at iteration {event.iteration} | {by_task} |")
        event.log(values)


def held_out_lines(values: dict[str, float]) -> tuple[str, str]:
    """Format the means over all records, and the loss of each task ("" without tasks), for the log."""
    plain = {
        name.removeprefix("validation/"): value for name, value in values.items() if name.count("/") == 1
    }
    tasks = []
    for name, value in values.items():
        if name.startswith("validation/task/") and name.endswith("/loss"):
            bounds = [values.get(name + end) for end in (LOW, HIGH)]
            said = "" if None in bounds else f" [{bounds[0]:.3E}, {bounds[1]:.3E}]"
            tasks.append(f"{name.split('/')[2]}: {value:.6E}{said}")
    whole = " | ".join(f"{name}: {value:.6E}" for name, value in plain.items())
    return whole, " | ".join(tasks)
