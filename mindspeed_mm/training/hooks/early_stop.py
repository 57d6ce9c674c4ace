"""The hook `early_stop`, which ends the run when the held-out loss no longer decreases."""

from __future__ import annotations

import math
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import json_type
from mindspeed_mm.training.hooks.base import EvalEvent, Hook
from mindspeed_mm.training.hooks.config import EarlyStopConfig


class EarlyStop(Hook):
    """Counts the evaluations since the lowest held-out loss. The count and the loss are checkpointed."""

    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self._best: float | None = None
        self._waited = 0  # evaluations since the best one

    def on_eval(self, event: EvalEvent) -> None:
        """Compare the loss with the lowest so far, and stop when the patience is exhausted.

        A loss that is not finite counts as no improvement.
        """
        loss = event.values.get("validation/loss", math.nan)
        if math.isfinite(loss) and (self._best is None or loss < self._best - self._config.min_delta):
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited >= self._config.patience:
            lowest = "no finite one" if self._best is None else f"{self._best:.6E}"
            event.stop(f"early_stop: no lower held-out loss than {lowest} in {self._waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the lowest loss and the number of evaluations since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the lowest loss and the count. Raises WeightsError if `state` is invalid."""
        best, waited = state.get("best"), state.get("waited")
        if not (best is None or isinstance(best, float)) or type(waited) is not int or waited < 0:
            raise WeightsError(
                f"got {json_type(best)} and {json_type(waited)}",
                where="the checkpoint's state of early_stop",
                expected="a loss, and a number of evaluations",
                fix="load another iteration",
            )
        self._best, self._waited = best, waited
