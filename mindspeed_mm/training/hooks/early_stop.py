"""`early_stop`: end the run when the held-out loss no longer falls."""

from __future__ import annotations

import math
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import json_type
from mindspeed_mm.training.hooks.base import EvalEvent, Hook
from mindspeed_mm.training.hooks.config import EarlyStopConfig


class EarlyStop(Hook):
    """Counts evaluations since the lowest held-out loss; a checkpoint holds both."""

    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self._best: float | None = None
        self._waited = 0  # evaluations since then

    def on_eval(self, event: EvalEvent) -> None:
        """Compare the loss, and stop when patience is over. A loss that is not finite is not lower."""
        loss = event.values.get("validation/loss", math.nan)
        if math.isfinite(loss) and (self._best is None or loss < self._best - self._config.min_delta):
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited >= self._config.patience:
            lowest = "no finite one" if self._best is None else f"{self._best:.6E}"
            event.stop(f"early_stop: no lower held-out loss than {lowest} in {self._waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """The lowest loss, and the evaluations since."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the count. Raises WeightsError for a state that is none."""
        best, waited = state.get("best"), state.get("waited")
        if not (best is None or isinstance(best, float)) or type(waited) is not int or waited < 0:
            raise WeightsError(
                f"got {json_type(best)} and {json_type(waited)}",
                where="the checkpoint's state of early_stop",
                expected="a loss, and a number of evaluations",
                fix="load another iteration",
            )
        self._best, self._waited = best, waited
