"""What a run reports.

The log line's interval means, metrics.jsonl, TensorBoard, Weights & Biases, loss spikes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron.mm.log_line import iteration_line
from mindspeed_mm.log import get_logger
from mindspeed_mm.training.step import SampleNote

logger = get_logger(__name__)
READERS = "readers"  # of `StepReport.costs`: work of other processes, beside the iteration


@dataclass(frozen=True)
class StepReport:
    """One iteration in numbers, the same on every rank (seconds and memory are this rank's)."""

    iteration: int
    consumed_samples: int
    loss: float
    grad_norm: float
    lr: float  # of the next iteration, as in Megatron's log
    stepped: bool  # False: loss or gradient was not finite, the update was skipped
    seconds: float
    phases: dict[str, float]  # seconds of data, forward, backward, communication, optimizer
    tokens: float  # of the global batch
    model_tflop: float  # of the global batch
    hardware_tflop: float
    peak_memory: int  # bytes
    losses: dict[str, float] = field(
        default_factory=dict
    )  # unweighted, of each task and quarter of timesteps
    costs: dict[str, float] = field(default_factory=dict)  # seconds of making samples of raw clips


@dataclass
class Interval:
    """Means since the last log line, as Megatron prints them: skipped iterations count in no mean."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tflop: float = 0.0
    skipped: int = 0
    nans: int = 0

    def add(self, report: StepReport) -> None:
        """Count one iteration."""
        self.seconds.append(report.seconds)
        self.tflop += report.model_tflop
        if report.stepped:
            self.losses.append(report.loss)
        else:
            self.skipped += 1
            self.nans += not math.isfinite(report.loss)

    def line(
        self, report: StepReport, *, train_iters: int, global_batch_size: int, devices: int, rate: bool
    ) -> str:
        """Megatron's line for the iterations since the last one."""
        total = sum(self.seconds)
        return iteration_line(
            iteration=report.iteration,
            train_iters=train_iters,
            consumed_samples=report.consumed_samples,
            milliseconds=1000 * total / len(self.seconds),
            tflops=self.tflop / total / devices if rate else None,
            learning_rate=report.lr,
            global_batch_size=global_batch_size,
            loss=sum(self.losses) / len(self.losses) if self.losses else None,
            grad_norm=report.grad_norm if report.stepped else None,
            skipped=self.skipped,
            nans=self.nans,
        )


def rates(report: StepReport, devices: int, peak_tflops: float | None) -> dict[str, float]:
    """tokens/s of the run, TFLOP/s of one device, and MFU and HFU where the peak is known."""
    found = {
        "tokens_per_second": report.tokens / report.seconds,
        "tflops": report.model_tflop / report.seconds / devices,
    }
    if peak_tflops:
        found["mfu"] = found["tflops"] / peak_tflops
        found["hfu"] = report.hardware_tflop / report.seconds / devices / peak_tflops
    return found


def cost_line(report: StepReport) -> str:
    """What the samples of the next iteration took, beside the whole of this one.

    "" where they are read from features.
    """
    if not report.costs:
        return ""
    parts = " | ".join(f"{name}: {1000 * seconds:.1f}" for name, seconds in report.costs.items())
    share = sum(seconds for name, seconds in report.costs.items() if name != READERS) / report.seconds
    return (
        f" samples made in iteration {report.iteration} (ms) | {parts} | "
        f"share of the iteration: {100 * share:.1f} % |"
    )


class SpikeWatch:
    """Reports samples whose loss is far above what is usual at their timestep.

    Timesteps are compared in ten bands.
    """

    BANDS = 10
    WARM = 20  # samples of a band before its mean means something

    def __init__(
        self, factor: float, num_train_timesteps: int, means: dict[int, tuple[int, float]] | None = None
    ) -> None:
        """`means`: band → (samples seen, running mean), kept up to date in place; a checkpoint holds it."""
        self._factor, self._width = factor, num_train_timesteps / self.BANDS
        self._means = {} if means is None else means

    def see(self, notes: list[SampleNote]) -> list[str]:
        """Count the samples of one iteration.

        A sentence for each that is `factor` times its band's running mean.
        """
        said = []
        for note in notes:
            if not math.isfinite(note.loss):
                continue
            band = min(int(note.timestep / self._width), self.BANDS - 1)
            count, mean = self._means.get(band, (0, 0.0))
            if count >= self.WARM and note.loss > self._factor * mean:
                said.append(
                    f"loss spike: {note.loss:.4f} is {note.loss / mean:.1f} times the usual {mean:.4f} "
                    f"near timestep {note.timestep:.1f}: sample {note.sample_index} ({note.key})"
                )
            keep = max(0.02, 1 / (count + 1))
            self._means[band] = (count + 1, mean + keep * (note.loss - mean))
        return said
