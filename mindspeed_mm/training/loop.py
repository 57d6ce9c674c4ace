"""The loop: iterations, what is said about them, held-out loss, checkpoints, and when to stop."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Protocol

from megatron.mm.log_line import memory_line
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.errors import DataError, LaunchError, MindSpeedMMError
from mindspeed_mm.flow.schedule import Schedule
from mindspeed_mm.log import get_logger, on_every_rank, rank, world_size
from mindspeed_mm.models.wan.flops import Flops
from mindspeed_mm.processes import Stopped, deferred, handling_signals
from mindspeed_mm.progress import Progress
from mindspeed_mm.training.checkpoint_folder import Best
from mindspeed_mm.training.config import TrainingConfig
from mindspeed_mm.training.groups import GroupMeans, LossGroups
from mindspeed_mm.training.guard import ExitWatch, FiniteGuard
from mindspeed_mm.training.metric_writers import Writer, flat
from mindspeed_mm.training.metrics import Interval, SpikeWatch, StepReport, cost_line, rates
from mindspeed_mm.training.state import TrainState
from mindspeed_mm.training.step import LocalWork, StepSettings, accumulate, mean_over_ranks, update
from mindspeed_mm.training.timers import PHASES, PhaseTimers
from mindspeed_mm.training.validation import held_out_lines

logger = get_logger(__name__)
_LOST = re.compile(r"timed? ?out|connection (closed|reset|refused)|watchdog|broken pipe", re.IGNORECASE)


class Saver(Protocol):
    """What the loop needs of a Checkpointer."""

    def save(self, state: TrainState, /, best: Best | None = None) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """Everything the loop drives. It builds nothing itself."""

    state: TrainState
    batches: Generator[Batch, None, None]  # endless, from state.consumed_samples on
    schedule: Schedule
    step: StepSettings
    dp_size: int  # ranks that see different samples
    cost: Callable[
        [tuple[int, ...]], tuple[int, Flops]
    ]  # (R+F, h, w, text rows) → tokens and operations of one sample
    checkpoints: Saver | None  # None without --save
    evaluate: Callable[[], dict[str, float]] | None  # held-out loss
    writers: list[Writer]  # empty but on the logging rank
    observe: Callable[[int], None]  # called with each finished iteration: the profiler
    accelerator: Accelerator
    peak_tflops: float | None = None
    videos: Callable[[int], dict[str, float]] | None = (
        None  # called with the iteration; → scores of what it wrote
    )
    tasks: tuple[str, ...] = ()  # those whose loss is reported, the same on every rank
    best: Best | None = None  # of the run so far
    costs: Callable[[], dict[str, float]] | None = (
        None  # seconds that making the samples took, since the last call
    )


class TrainLoop:
    """Runs `parts` until train_iters, or until something says stop."""

    def __init__(self, config: TrainingConfig, parts: LoopParts) -> None:
        self.config, self.parts = config, parts
        self.global_batch_size: int = config.batch.global_batch_size or 1
        self.train_iters: int = config.batch.train_iters or 0
        self.speaks = rank() == world_size() - 1  # as in Megatron, the last rank logs
        self.timers = PhaseTimers(parts.accelerator.device)
        self.guard = FiniteGuard(config.exit, parts.state.skips)
        self.spikes = SpikeWatch(config.log.spike_factor, len(parts.schedule.sigmas), parts.state.loss_means)
        self.interval = Interval()
        self.groups = LossGroups.of(parts.tasks, parts.schedule)
        self.group_means = GroupMeans(self.groups)
        self.lines = 0
        self._ahead: list[Batch] | None = None  # micro-batches of the next iteration
        self._failed: MindSpeedMMError | None = None  # on this rank; raised by all ranks together
        self._any_failed = False  # the same on every rank

    def run(self) -> None:
        """Train. Saves at --save-interval, at the end, and before an early stop.

        Raises Stopped after that of a signal.
        """
        watch = ExitWatch(self.config.exit)
        with handling_signals(), deferred():
            self._run(watch)
        if watch.stopped_by:
            raise Stopped(watch.stopped_by, said=True)

    def _run(self, watch: ExitWatch) -> None:
        state, saved = self.parts.state, self.parts.state.iteration
        bar = self._bar(state.iteration)
        try:
            while state.iteration < self.train_iters:
                report, anywhere = self.iterate(watch.local())
                if self.parts.checkpoints is not None:
                    self.parts.checkpoints.poll()
                bar.clear()  # the log line takes the bar's place, and the bar comes back below it
                self.say(report)
                bar.step(note=f"loss={report.loss:.4f}")
                reason = watch.reason(report.iteration, anywhere)
                best = None
                due = self._due(self.config.checkpoint.save_interval, report.iteration)
                if self._due(self.config.eval.eval_interval, report.iteration):
                    loss = self.evaluate(report.iteration)
                    last = report.iteration >= self.train_iters
                    best = self._best_now(loss, alone=not (due or reason or last))
                    if self.parts.videos is not None and (scores := self.parts.videos(report.iteration)):
                        self._write(report.iteration, scores)
                if reason or due or best is not None:
                    saved = self.save(best)
                if reason:
                    logger.info(f"exiting after iteration {report.iteration}: {reason}")
                    break
            if saved != state.iteration:
                self.save()
            if self.parts.checkpoints is not None:
                self.parts.checkpoints.wait()
            raise_on_all_ranks(self._raise_failed)
        except RuntimeError as error:  # torch's errors of process groups are RuntimeErrors, too
            if died := _dead_worker(error, state.iteration + 1):  # its signal arrives in any phase
                raise died from error
            if not _LOST.search(str(error)):
                raise
            raise LaunchError(
                f"lost the other ranks in iteration {state.iteration + 1}, phase {self.timers.current}: "
                f"{str(error).strip().splitlines()[0]}",
                where=f"rank {rank()} of {world_size()}",
                fix="look for the first error in the log, or raise --distributed-timeout-minutes",
            ) from error
        finally:
            bar.close()
            for writer in self.parts.writers:
                writer.close()

    def iterate(self, local_flags: list[float]) -> tuple[StepReport, list[float]]:
        """One iteration. → its report, and the ranks' mean of `local_flags`.

        Raises TrainingError when it must not continue.
        """
        parts, start = self.parts, time.perf_counter()
        parts.accelerator.reset_peak_memory()
        batches = self._take()
        work = accumulate(
            parts.state.model,
            batches,
            parts.schedule,
            parts.step,
            parts.accelerator.device,
            self.timers,
        )
        del batches
        if parts.state.iteration + 1 < self.train_iters:  # the device still computes
            self._read_ahead(parts.state.iteration + 2)
        failed = float(self._failed is not None)
        with self.timers.phase("communication"):
            loss, sums = mean_over_ranks(
                [*self._cost(work), failed, *local_flags],
                work.losses,
                parts.accelerator.device,
                self.groups.totals(work),
            )
        with self.timers.phase("optimizer"):
            grad_norm, stepped = update(parts.state.model, parts.state.optimizer, loss, parts.step.clip_grad)
        if stepped:
            parts.state.scheduler.step(self.global_batch_size)
        parts.accelerator.synchronize()
        parts.state.iteration += 1
        parts.state.consumed_samples += self.global_batch_size
        tokens, model_tflop, hardware_tflop, failed, *anywhere = sums[: 4 + len(local_flags)]
        totals = sums[4 + len(local_flags) :]
        if stepped:
            self.group_means.add(totals)
        self._any_failed = failed > 0
        report = StepReport(
            iteration=parts.state.iteration,
            consumed_samples=parts.state.consumed_samples,
            loss=loss,
            grad_norm=grad_norm,
            lr=float(parts.state.optimizer.param_groups[0]["lr"]),
            stepped=stepped,
            seconds=time.perf_counter() - start,
            phases=self.timers.take(),
            tokens=tokens * parts.dp_size,
            model_tflop=model_tflop * parts.dp_size,
            hardware_tflop=hardware_tflop * parts.dp_size,
            peak_memory=parts.accelerator.max_memory_allocated(),
            losses=self.groups.means(totals),
            costs={} if parts.costs is None else parts.costs(),
        )
        notes = work.notes()
        self.guard.see(report.iteration, loss, grad_norm, stepped, notes)
        for sentence in self.spikes.see(notes):
            logger.info(f"iteration {report.iteration}: {sentence}", extra=on_every_rank())
        return report, anywhere

    def say(self, report: StepReport) -> None:
        """Log line, memory line, writers, profiler."""
        self.interval.add(report)
        self.parts.observe(report.iteration)
        speed = rates(report, world_size(), self.parts.peak_tflops)
        self._write(report.iteration, flat(report, speed))
        if report.iteration % self.config.log.log_interval:
            return
        if self.speaks:
            line = self.interval.line(
                report,
                train_iters=self.train_iters,
                global_batch_size=self.global_batch_size,
                devices=world_size(),
                rate=self.config.log.log_throughput,
            )
            logger.info(line, extra=on_every_rank())
            for more in filter(None, (self.group_means.line(report.iteration), cost_line(report))):
                logger.info(more, extra=on_every_rank())
            if self.config.log.log_throughput:
                logger.info(_rate_line(report, speed), extra=on_every_rank())
            if self.config.log.timing_log_level:
                logger.info(_phase_line(report), extra=on_every_rank())
        if self.lines == 0:
            memory = self.parts.accelerator
            logger.info(
                memory_line(
                    rank(), report.iteration, memory.memory_allocated(), memory.max_memory_allocated()
                )
            )
        self.lines += 1
        self.interval, self.group_means = Interval(), GroupMeans(self.groups)

    def evaluate(self, iteration: int) -> float | None:
        """Held-out loss, when there is a held-out set; → the mean over all of it."""
        if self.parts.evaluate is None or not self.config.eval.eval_iters:
            return None
        values = self.parts.evaluate()
        whole, by_task = held_out_lines(values)
        logger.info(f" validation loss at iteration {iteration} | {whole} |")
        if by_task:
            logger.info(f" validation loss of each task at iteration {iteration} | {by_task} |")
        self._write(iteration, values)
        return values.get("validation/loss")

    def _best_now(self, loss: float | None, *, alone: bool) -> Best | None:
        """What --save-best keeps: the lowest held-out loss so far. `alone`: no other reason to save now."""
        if loss is None or not self.config.checkpoint.save_best or not math.isfinite(loss):
            return None
        before = self.parts.best
        if before is not None and loss >= before.loss:
            return None
        found = Best(iteration=self.parts.state.iteration, loss=loss, alone=alone)
        self.parts = replace(self.parts, best=found)
        return found

    def save(self, best: Best | None = None) -> int:
        """Write a checkpoint if there is a place for it. → the iteration."""
        if self.parts.checkpoints is not None:
            self.parts.checkpoints.save(self.parts.state, best)
        return self.parts.state.iteration

    def _take(self) -> list[Batch]:
        """The micro-batches of this iteration. Raises the first rank's error on all ranks.

        A rank that raised alone would leave the others in a collective until it times out. Whether any rank
        failed is known from the exchange of the iteration before; only the first iteration pays for an
        exchange of its own.
        """
        if self._any_failed:
            raise_on_all_ranks(self._raise_failed)
        if self._ahead is None:
            self._read_ahead(self.parts.state.iteration + 1)
            raise_on_all_ranks(self._raise_failed)
        taken, self._ahead = self._ahead or [], None
        return taken

    def _read_ahead(self, iteration: int) -> None:
        with self.timers.phase("data"):
            try:
                self._ahead = [next(self.parts.batches) for _ in range(self.parts.step.micro_batches)]
            except MindSpeedMMError as error:
                self._failed = self._failed or error
            except RuntimeError as error:
                if not (died := _dead_worker(error, iteration)):
                    raise
                self._failed = self._failed or died

    def _raise_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _write(self, iteration: int, values: dict[str, float]) -> None:
        """Give the numbers to the writers of this rank; a failure is everybody's, in the next exchange."""
        try:
            for writer in self.parts.writers if self._failed is None else ():
                writer.write(iteration, values)
        except MindSpeedMMError as error:
            self._failed = error
            self._any_failed = world_size() == 1

    def _cost(self, work: LocalWork) -> list[float]:
        """Tokens, model TFLOP and hardware TFLOP of this rank.

        Context-parallel ranks share a sample's cost.
        """
        costs = [self.parts.cost(size) for size in work.sizes]
        return [
            float(sum(tokens for tokens, _ in costs)),
            sum(flops.model for _, flops in costs) / 1e12,
            sum(flops.hardware for _, flops in costs) / 1e12,
        ]

    def _due(self, interval: int | None, iteration: int) -> bool:
        return interval is not None and iteration % interval == 0

    def _bar(self, done: int) -> Progress:
        return Progress("", self.train_iters, "it", initial=done, shown=self.speaks, every=None)


def _dead_worker(error: RuntimeError, iteration: int) -> DataError | None:
    if "DataLoader worker" not in str(error):
        return None
    return DataError(
        f"a data worker died in iteration {iteration}: {str(error).strip().splitlines()[0]}",
        where=f"rank {rank()}",
        fix="lower --num-workers if memory ran out (`dmesg`)",
    )


def _phase_line(report: StepReport) -> str:
    parts = " | ".join(f"{name}: {1000 * report.phases[name]:.1f}" for name in PHASES)
    return f" times of iteration {report.iteration} (ms) | {parts} | all: {1000 * report.seconds:.1f} |"


def _rate_line(report: StepReport, speed: dict[str, float]) -> str:
    parts = [f"tokens/s: {speed['tokens_per_second']:.1f}", f"TFLOP/s per device: {speed['tflops']:.1f}"]
    parts += [f"{name.upper()}: {100 * speed[name]:.1f} %" for name in ("mfu", "hfu") if name in speed]
    return f" speed of iteration {report.iteration} | {' | '.join(parts)} |"
