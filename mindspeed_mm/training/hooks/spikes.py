"""Detects loss spikes: samples whose loss is far above the usual loss at their timestep."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mindspeed_mm.log import get_logger, on_every_rank
from mindspeed_mm.training.hooks.base import Hook, StartEvent, StepEvent
from mindspeed_mm.training.step import SampleNote

logger = get_logger(__name__)


class Spikes(Hook):
    """Logs each spike on the rank where it occurs. Checkpoints contain the running means, `loss_means`."""

    def on_start(self, event: StartEvent) -> None:
        """Continue with the running means of `event.state`."""
        timesteps = len(event.step.schedule.sigmas)
        self._watch = SpikeWatch(event.config.log.spike_factor, timesteps, event.state.loss_means)

    def on_step(self, event: StepEvent) -> None:
        """Compare this rank's samples with the running means."""
        for sentence in self._watch.check(event.notes):
            logger.info(f"iteration {event.report.iteration}: {sentence}", extra=on_every_rank())


class SpikeWatch:
    """Reports samples whose loss is far above the usual loss at their timestep.

    Timesteps are divided into ten bands, each with its own running mean.
    """

    BANDS = 10
    WARM = 20  # number of samples in a band before its mean is used

    def __init__(
        self, factor: float, num_train_timesteps: int, means: dict[int, tuple[int, float]] | None = None
    ) -> None:
        """Create a watch.

        `means` maps each band to (samples seen, running mean). It is updated in place and checkpointed.
        """
        self._factor, self._width = factor, num_train_timesteps / self.BANDS
        self._means = {} if means is None else means

    def check(self, notes: Sequence[SampleNote]) -> list[str]:
        """Count the samples of one iteration, and describe the spikes.

        Returns a sentence for each sample whose loss exceeds `factor` times the running mean of its band.
        """
        messages = []
        for note in notes:
            if not math.isfinite(note.loss):
                continue
            band = min(int(note.timestep / self._width), self.BANDS - 1)
            count, mean = self._means.get(band, (0, 0.0))
            if count >= self.WARM and note.loss > self._factor * mean:
                messages.append(
                    f"loss spike: {note.loss:.4f} is {note.loss / mean:.1f} times the usual {mean:.4f} "
                    f"near timestep {note.timestep:.1f}: sample {note.sample_index} ({note.key})"
                )
            keep = max(0.02, 1 / (count + 1))
            self._means[band] = (count + 1, mean + keep * (note.loss - mean))
        return messages
