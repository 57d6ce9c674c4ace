"""Iterations whose loss or gradient is not finite: they are skipped, and too many in a row end the run."""

from __future__ import annotations

import math

from mindspeed_mm.distributed.launch import gather_objects
from mindspeed_mm.errors import TrainingError
from mindspeed_mm.log import get_logger
from mindspeed_mm.training.hooks.base import Hook, StartEvent, StepEvent
from mindspeed_mm.training.step import SampleNote

logger = get_logger(__name__)


class FiniteGuard(Hook):
    """Counts skipped iterations in `state.skips`, which a checkpoint holds: a resumed run counts on."""

    alike = True

    def on_start(self, event: StartEvent) -> None:
        """Read how many may follow one another."""
        config = event.config.exit
        self._allowed = 0 if config.check_for_nan_in_loss_and_grad else config.max_skipped_iterations
        self._skips = event.state.skips

    def on_step(self, event: StepEvent) -> None:
        """Count one iteration. Raises TrainingError naming samples and timesteps."""
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
    """The notes of all ranks: those with a bad loss if any rank has one."""
    together = list(dict.fromkeys(note for part in gather_objects(notes) for note in part))
    return [note for note in together if not math.isfinite(note.loss)] or together
