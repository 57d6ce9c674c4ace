"""When an iteration is not finite, and when to stop: what Megatron's loop asks after every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch.distributed as dist

from mindspeed_mm.errors import TrainingError
from mindspeed_mm.log import get_logger
from mindspeed_mm.processes import STOP_SIGNALS, stop_signal
from mindspeed_mm.training.config import ExitConfig
from mindspeed_mm.training.state import Skips
from mindspeed_mm.training.step import SampleNote

logger = get_logger(__name__)


class FiniteGuard:
    """Counts iterations whose loss or gradient is not finite.

    They are skipped, and too many in a row end the run.

    `skips` is kept up to date in place; a checkpoint holds it, so that a run which is started again counts
    on.
    """

    def __init__(self, config: ExitConfig, skips: Skips) -> None:
        self._allowed = 0 if config.check_for_nan_in_loss_and_grad else config.max_skipped_iterations
        self._skips = skips

    def see(
        self, iteration: int, loss: float, grad_norm: float, stepped: bool, notes: list[SampleNote]
    ) -> None:
        """Count one iteration; every rank must call this.

        Raises TrainingError naming samples and timesteps.
        """
        self._skips.in_a_row = 0 if stepped else self._skips.in_a_row + 1
        if stepped:
            return
        self._skips.total += 1
        culprits = _everywhere([note for note in notes if not math.isfinite(note.loss)] or notes)
        text = (
            f"iteration {iteration} skipped: loss {loss}, gradient norm {grad_norm}; samples "
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
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return notes
    gathered: list[list[SampleNote]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, notes)
    together = list(dict.fromkeys(note for part in gathered for note in part))
    return [note for note in together if not math.isfinite(note.loss)] or together


class ExitWatch:
    """--exit-interval, --exit-duration-in-mins and signals.

    `local` goes into the iteration's exchange; `reason` decides.
    """

    def __init__(self, config: ExitConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock, self._start = config, clock, clock()
        self.stopped_by = 0  # the signal that `reason` ended the run for

    def local(self) -> list[float]:
        """[SIGINT, SIGTERM, SIGHUP seen here, time is up here], as numbers that ranks average."""
        minutes = (self._clock() - self._start) / 60
        limit = self._config.exit_duration_in_mins
        seen = stop_signal()
        return [
            *(float(number == seen) for number in STOP_SIGNALS),
            float(limit is not None and minutes > limit),
        ]

    def reason(self, iteration: int, anywhere: list[float]) -> str | None:
        """Why to stop after this iteration, the same on every rank; None to continue."""
        *signals, expired = anywhere
        for number, share in zip(STOP_SIGNALS, signals, strict=True):
            if share:
                self.stopped_by = number
                return f"{number.name} was received"
        if expired:
            return f"--exit-duration-in-mins {self._config.exit_duration_in_mins:g} is over"
        if self._config.exit_interval and iteration % self._config.exit_interval == 0:
            return f"--exit-interval {self._config.exit_interval} is reached"
        return None
