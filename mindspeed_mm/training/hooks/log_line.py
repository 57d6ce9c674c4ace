"""The log output of iterations: Megatron's log line, the lines below it, and the memory line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron.mm.log_line import iteration_line, memory_line
from mindspeed_mm.log import get_logger, is_logging_rank, on_every_rank, rank, world_size
from mindspeed_mm.training.groups import GroupMeans
from mindspeed_mm.training.hooks.base import Hook, StartEvent, StepEvent
from mindspeed_mm.training.metrics import READERS, StepReport, rates
from mindspeed_mm.training.timers import PHASES

logger = get_logger(__name__)


class LogLine(Hook):
    """Logs a line at --log-interval on the last rank, as Megatron does, and memory after the first line."""

    def __init__(self, peak_tflops: float | None = None) -> None:
        """Create the hook. `peak_tflops` is the device's peak for MFU and HFU; None omits them."""
        self._peak = peak_tflops

    def on_start(self, event: StartEvent) -> None:
        """Initialize the means of the first line."""
        self._config, self._groups, self._memory = event.config, event.groups, event.accelerator
        self._is_first = True
        self._interval, self._group_means = Interval(), GroupMeans(event.groups)

    def on_step(self, event: StepEvent) -> None:
        """Count one iteration, and log a line if one is due."""
        report = event.report
        self._interval.add(report)
        if report.stepped:
            self._group_means.add(event.group_totals)
        if report.iteration % self._config.log.log_interval:
            return
        if is_logging_rank():
            for line in filter(None, self._lines(report)):
                logger.info(line, extra=on_every_rank())
        if self._is_first:
            used, peak = self._memory.memory_allocated(), self._memory.max_memory_allocated()
            logger.info(memory_line(rank(), report.iteration, used, peak))
        self._is_first = False
        self._interval, self._group_means = Interval(), GroupMeans(self._groups)

    def _lines(self, report: StepReport) -> list[str]:
        log, batch = self._config.log, self._config.batch
        line = self._interval.line(
            report,
            train_iters=batch.train_iters or 0,
            global_batch_size=batch.global_batch_size or 1,
            devices=world_size(),
            rate=log.log_throughput,
        )
        lines = [line, self._group_means.line(report.iteration), cost_line(report)]
        if log.log_throughput:
            lines.append(_rate_line(report, rates(report, world_size(), self._peak)))
        if log.timing_log_level:
            lines.append(_phase_line(report))
        return lines


@dataclass
class Interval:
    """Statistics since the last log line, as Megatron prints them.

    The mean loss excludes skipped iterations.
    """

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
        """Format Megatron's log line for the iterations since the last log line."""
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


def cost_line(report: StepReport) -> str:
    """Format the time to make the next iteration's samples, and its share of this iteration.

    Returns "" if the samples are read from features.
    """
    if not report.costs:
        return ""
    parts = " | ".join(f"{name}: {1000 * seconds:.1f}" for name, seconds in report.costs.items())
    share = sum(seconds for name, seconds in report.costs.items() if name != READERS) / report.seconds
    return (
        f" samples made in iteration {report.iteration} (ms) | {parts} | "
        f"share of the iteration: {100 * share:.1f} % |"
    )


def _phase_line(report: StepReport) -> str:
    parts = " | ".join(f"{name}: {1000 * report.phases[name]:.1f}" for name in PHASES)
    return f" times of iteration {report.iteration} (ms) | {parts} | all: {1000 * report.seconds:.1f} |"


def _rate_line(report: StepReport, speed: dict[str, float]) -> str:
    parts = [f"tokens/s: {speed['tokens_per_second']:.1f}", f"TFLOP/s per device: {speed['tflops']:.1f}"]
    parts += [f"{name.upper()}: {100 * speed[name]:.1f} %" for name in ("mfu", "hfu") if name in speed]
    return f" speed of iteration {report.iteration} | {' | '.join(parts)} |"
