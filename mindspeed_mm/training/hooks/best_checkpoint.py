"""The hook of --save-best, which keeps the checkpoint with the lowest held-out loss."""

from __future__ import annotations

import math

from mindspeed_mm.training.checkpoint_folder import Best
from mindspeed_mm.training.hooks.base import EvalEvent, Hook


class BestCheckpoint(Hook):
    """Requests a checkpoint of each iteration whose held-out loss is the lowest so far."""

    alike = True

    def __init__(self, best: Best | None = None) -> None:
        """Create the hook. `best` is the best checkpoint of the run so far."""
        self._best = best

    def on_eval(self, event: EvalEvent) -> None:
        """Compare the loss that an earlier hook measured with the lowest so far."""
        loss = event.values.get("validation/loss", math.nan)
        if math.isfinite(loss) and (self._best is None or loss < self._best.loss):
            self._best = event.best = Best(iteration=event.iteration, loss=loss, alone=not event.saves)
