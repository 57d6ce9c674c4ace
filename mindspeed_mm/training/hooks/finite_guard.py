"""Handles iterations whose loss or gradient is not finite.

Such iterations are skipped. Too many in a row end the run.
"""

from __future__ import annotations

import math

from mindspeed_mm.distributed.launch import gather_objects
from mindspeed_mm.errors import TrainingError
from mindspeed_mm.log import get_logger
from mindspeed_mm.training.hooks.base import Hook, StartEvent, StepEvent
from mindspeed_mm.training.step import SampleNote

logger = get_logger(__name__)


class FiniteGuard(Hook):
    """Counts skipped iterations in `state.skips`. A resumed run continues the count of its checkpoint."""

    alike = True

    def on_start(self, event: StartEvent) -> None:
        """Read the maximum number of consecutive skipped iterations."""
        config = event.config.exit
        self._allowed = 0 if config.check_for_nan_in_loss_and_grad else config.max_skipped_iterations
        self._skips = event.state.skips

    def on_step(self, event: StepEvent) -> None:
        """Count one iteration.

        Raises TrainingError that names samples and timesteps if too many iterations in a row were skipped.
        """
        report = event.report
        self._skips.in_a_row = 0 if report.stepped else self._skips.in_a_row + 1
        if report.stepped:
            return
        self._skips.total += 1
        culprits = _everywhere(
            [note for note in event.notes if not math.isfinite(note.loss)] or [*event.notes]
        )
        text = (
            f"iteration {report.iteration} skipped: loss {report.loss}, gradient norm {report.grad_norm}; "
            "samples "
            + ", ".join(
                f"{note.key} (number {note.sample_index}, timestep {note.timestep:.1f})"
                for note in culprits[:8]
            )
            + (f" and {len(culprits) - 8} more" if len(culprits) > 8 else "")
        )
        if self._skips.in_a_row > self._allowed:
            raise TrainingError(
                f"{text}; {self._skips.in_a_row} in a row are not finite",
                fix="lower --lr, or inspect these samples",
            )
        logger.info(f"{text}; {self._skips.total} of this run so far")


def _everywhere(notes: list[SampleNote]) -> list[SampleNote]:
    """Gather the notes of all ranks. If any loss is not finite, returns only the notes of those losses."""
    every_note = list(dict.fromkeys(note for part in gather_objects(notes) for note in part))
    return [note for note in every_note if not math.isfinite(note.loss)] or every_note
