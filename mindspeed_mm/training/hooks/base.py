"""Base class of training hooks, and the events that they receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # --dry-run imports the modules of registered hooks, and must not import torch
    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.training.checkpoint_folder import Best
    from mindspeed_mm.training.config import TrainingConfig
    from mindspeed_mm.training.groups import LossGroups
    from mindspeed_mm.training.metrics import StepReport
    from mindspeed_mm.training.state import TrainState
    from mindspeed_mm.training.step import SampleNote, StepSettings

Log = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class StartEvent:
    """Start of a run, before its first iteration. `state` is the state to start or resume from."""

    config: TrainingConfig
    state: TrainState
    step: StepSettings
    groups: LossGroups  # sample groups whose losses are reported
    accelerator: Accelerator


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One finished iteration, after the update of the weights. Gradients are already cleared."""

    report: StepReport
    notes: Sequence[SampleNote]  # the samples of this rank
    group_totals: Sequence[float]  # [2 · groups]: sums of losses, then counts; means over ranks
    log: Log  # sends more numbers of this iteration to `on_metrics`
    stop: Callable[[str], None]  # takes a reason; saves and ends the run after the next iteration


@dataclass(kw_only=True)
class EvalEvent:
    """An evaluation at --eval-interval.

    Hooks measure values and `log` them. Hooks later in the list can read them from `values`.
    """

    iteration: int
    saves: bool  # whether this iteration is saved regardless of `best`
    record: Log
    stop: Callable[[str], None]  # as in a StepEvent
    values: dict[str, float] = field(default_factory=dict)  # measured so far, such as validation/loss
    # Set it to the same value on every rank to save this iteration and record it in best.json.
    best: Best | None = None

    def log(self, values: Mapping[str, float]) -> None:
        """Add numbers to `values`, and send them to `on_metrics`."""
        self.values |= values
        self.record(values)


@dataclass(frozen=True, kw_only=True)
class SaveEvent:
    """A complete checkpoint. With --async-save, this event comes some iterations after the save starts."""

    iteration: int
    folder: Path  # SAVE/iter_0000010


class Hook:
    """Base class of training hooks. Override the methods that a hook needs.

    Every rank calls every hook, in the order of the list. A hook must not use collectives in `on_step`.

    If a hook raises MindSpeedMMError on one rank, the run ends on all ranks after the next iteration, and the
    hook is not called again. Any other exception is treated as a bug: it ends its rank immediately, with a
    traceback.
    """

    # True if the hook behaves identically on every rank. It may then use collectives in `on_eval`, and its
    # errors are raised immediately.
    alike: ClassVar[bool] = False
    name: str = ""  # key of the hook's state: its `type` in the model JSON, or else the name of its class

    def on_start(self, event: StartEvent) -> None:
        """Called before the first iteration, after `load_state_dict`."""

    def on_step(self, event: StepEvent) -> None:
        """Called after every iteration, including those whose update was skipped."""

    def on_eval(self, event: EvalEvent) -> None:
        """Called at --eval-interval, after `on_step`."""

    def on_save(self, event: SaveEvent) -> None:
        """Called when a checkpoint is complete."""

    def on_metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Called for each set of numbers that any hook logs, including this one."""

    def close(self) -> None:
        """Called at the end of the run, even if the run failed."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint, as JSON values, or {} if there is none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned on this rank.

        A rank that is not in the checkpoint gets the state of rank 0.
        """
