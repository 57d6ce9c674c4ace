"""The training loop: iterations with one reduction over ranks each, checkpoints, and early exits.

All other behaviour is implemented in hooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron.mm.layout import iteration_folder
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.sample import Batch
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.log import get_logger, is_logging_rank
from mindspeed_mm.models.wan.flops import Flops
from mindspeed_mm.processes import Stopped, deferred, handling_signals
from mindspeed_mm.progress import Progress
from mindspeed_mm.training.checkpoint_folder import Best
from mindspeed_mm.training.config import TrainingConfig
from mindspeed_mm.training.exits import ExitWatch
from mindspeed_mm.training.groups import LossGroups
from mindspeed_mm.training.hooks.base import EvalEvent, Hook, SaveEvent, StartEvent, StepEvent
from mindspeed_mm.training.hooks.runner import HookRunner
from mindspeed_mm.training.metrics import StepReport
from mindspeed_mm.training.rank_status import RankStatus, dead_worker, lost_process
from mindspeed_mm.training.state import TrainState
from mindspeed_mm.training.step import LocalWork, StepSettings, accumulate, mean_over_ranks, update
from mindspeed_mm.training.timers import PhaseTimers

logger = get_logger(__name__)


class Saver(Protocol):
    """The part of a Checkpointer that the trainer uses.

    Each method returns the iteration whose save it completed, if any.
    """

    def save(self, state: TrainState, /, best: Best | None = None) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The micro-batches of this rank, and their costs and tasks."""

    batches: Generator[Batch, None, None]  # endless; starts after state.consumed_samples
    # (R+F, h, w, text rows) → tokens and FLOPs of one sample
    cost: Callable[[tuple[int, ...]], tuple[int, Flops]]
    dp_size: int = 1  # number of data-parallel ranks, which see different samples
    tasks: tuple[str, ...] = ()  # tasks whose loss is reported; the same on every rank
    # seconds spent on making samples since the last call
    seconds: Callable[[], dict[str, float]] = dict


class Trainer:
    """Trains `state` on `data` until train_iters, or until an early exit is requested."""

    def __init__(
        self,
        config: TrainingConfig,
        state: TrainState,
        step: StepSettings,
        data: TrainData,
        hooks: Sequence[Hook] = (),
        *,
        accelerator: Accelerator,
        checkpoints: Saver | None = None,
    ) -> None:
        """Create a trainer. `hooks` are called in this order. Without `checkpoints`, none are written."""
        self.config, self.state, self.step, self.data = config, state, step, data
        self.accelerator, self.checkpoints = accelerator, checkpoints
        self.global_batch_size: int = config.batch.global_batch_size or 1
        self.train_iters: int = config.batch.train_iters or 0
        self.timers = PhaseTimers(accelerator.device)
        self.groups = LossGroups.of(data.tasks, step.schedule)
        self.status = RankStatus()
        self.hooks = HookRunner(hooks, self.status)
        self._ahead: list[Batch] | None = None  # micro-batches of the next iteration

    def run(self) -> None:
        """Train, and save at --save-interval, at the end and before an early exit.

        Raises Stopped after an early exit that a signal caused.
        """
        watch = ExitWatch(self.config.exit)
        with handling_signals(), deferred():
            self._run(watch)
        if watch.stopped_by:
            raise Stopped(watch.stopped_by, logged=True)

    def _run(self, watch: ExitWatch) -> None:
        state, saved, reason = self.state, self.state.iteration, None
        bar = Progress(
            "", self.train_iters, "it", initial=state.iteration, shown=is_logging_rank(), every=None
        )
        try:
            self.hooks.start(
                StartEvent(
                    config=self.config,
                    state=state,
                    step=self.step,
                    groups=self.groups,
                    accelerator=self.accelerator,
                )
            )
            while reason is None and state.iteration < self.train_iters:
                event, anywhere = self.iterate(watch.local())
                if self.checkpoints is not None:
                    self._saved(self.checkpoints.poll())
                bar.clear()  # so that the log line replaces the bar, which is drawn again below it
                self.hooks.step(event)
                bar.step(note=f"loss={event.report.loss:.4f}")
                reason = watch.reason(state.iteration, anywhere) or self.status.reason()
                is_last = reason is not None or state.iteration >= self.train_iters
                due, best = self._due(self.config.checkpoint.save_interval), None
                if self._due(self.config.eval.eval_interval):
                    evaluation = EvalEvent(
                        iteration=state.iteration,
                        saves=due or is_last,
                        record=self.hooks.log(state.iteration),
                        stop=self.status.request_stop,
                    )
                    self.hooks.evaluate(evaluation)
                    best = evaluation.best
                if due or best is not None:
                    saved = self.save(best)
            if saved != state.iteration:
                self.save()
            if reason is not None:
                logger.info(f"exiting after iteration {state.iteration}: {reason}")
            if self.checkpoints is not None:
                self._saved(self.checkpoints.wait())
            self.status.raise_together()
        except RuntimeError as error:
            if lost := lost_process(error, state.iteration + 1, self.timers.current):
                raise lost from error
            raise
        finally:
            bar.close()
            self.hooks.close()

    def iterate(self, local_flags: list[float]) -> tuple[StepEvent, list[float]]:
        """Run one iteration. Returns its event for the hooks, and the mean of `local_flags` over ranks."""
        state, start = self.state, time.perf_counter()
        self.accelerator.reset_peak_memory()
        batches = self._take()
        work = accumulate(state.model, batches, self.step, self.accelerator.device, self.timers)
        del batches
        if state.iteration + 1 < self.train_iters:  # read while the device is still computing
            self._read_ahead(state.iteration + 2)
        with self.timers.phase("communication"):
            loss, sums = mean_over_ranks(
                [*self._cost(work), self.status.flag, *local_flags],
                work.losses,
                self.accelerator.device,
                self.groups.totals(work),
            )
        with self.timers.phase("optimizer"):
            grad_norm, stepped = update(state.model, state.optimizer, loss, self.step.clip_grad)
        if stepped:
            state.scheduler.step(self.global_batch_size)
        self.accelerator.synchronize()
        state.iteration += 1
        state.consumed_samples += self.global_batch_size
        tokens, model_tflop, hardware_tflop, flagged, *anywhere = sums[: 4 + len(local_flags)]
        totals = sums[4 + len(local_flags) :]
        self.status.anywhere = flagged > 0
        report = StepReport(
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            loss=loss,
            grad_norm=grad_norm,
            lr=float(state.optimizer.param_groups[0]["lr"]),
            stepped=stepped,
            seconds=time.perf_counter() - start,
            phases=self.timers.take(),
            tokens=tokens * self.data.dp_size,
            model_tflop=model_tflop * self.data.dp_size,
            hardware_tflop=hardware_tflop * self.data.dp_size,
            peak_memory=self.accelerator.max_memory_allocated(),
            losses=self.groups.means(totals),
            costs=self.data.seconds(),
        )
        return StepEvent(
            report=report,
            notes=work.notes(),
            group_totals=totals,
            log=self.hooks.log(state.iteration),
            stop=self.status.request_stop,
        ), anywhere

    def save(self, best: Best | None = None) -> int:
        """Save a checkpoint, unless there is no checkpointer. Returns the iteration."""
        if self.checkpoints is not None:
            self.state.hooks = self.hooks.states()
            self._saved(self.checkpoints.save(self.state, best))
        return self.state.iteration

    def _saved(self, iteration: int | None) -> None:
        if iteration is not None:
            folder = iteration_folder(Path(self.config.checkpoint.save or ""), iteration)
            self.hooks.saved(SaveEvent(iteration=iteration, folder=folder))

    def _take(self) -> list[Batch]:
        """Return the micro-batches of this iteration. If a rank failed, raises its error on all ranks.

        The reduction of the previous iteration tells whether any rank failed. Only the first iteration needs
        a separate collective for this.
        """
        if self.status.anywhere:
            self.status.raise_together()
        if self._ahead is None:
            self._read_ahead(self.state.iteration + 1)
            self.status.raise_together()
        taken, self._ahead = self._ahead or [], None
        return taken

    def _read_ahead(self, iteration: int) -> None:
        with self.timers.phase("data"):
            try:
                self._ahead = [next(self.data.batches) for _ in range(self.step.micro_batches)]
            except MindSpeedMMError as error:
                self.status.fail(error)
            except RuntimeError as error:
                if not (died := dead_worker(error, iteration)):
                    raise
                self.status.fail(died)

    def _cost(self, work: LocalWork) -> list[float]:
        """Return the tokens, model TFLOP and hardware TFLOP of this rank.

        Context-parallel ranks share the cost of a sample.
        """
        costs = [self.data.cost(size) for size in work.sizes]
        return [
            float(sum(tokens for tokens, _ in costs)),
            sum(flops.model for _, flops in costs) / 1e12,
            sum(flops.hardware for _, flops in costs) / 1e12,
        ]

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.state.iteration % interval == 0
