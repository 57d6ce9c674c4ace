"""What a training behaviour derives from, and the events that it gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # a package may register a hook in the file that defines it: --dry-run needs no torch
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
    """The run before its first iteration; `state` is where it begins or resumes."""

    config: TrainingConfig
    state: TrainState
    step: StepSettings
    groups: LossGroups  # whose losses are reported
    accelerator: Accelerator


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One finished iteration; its update is done and its gradients are cleared."""

    report: StepReport
    notes: Sequence[SampleNote]  # this rank's samples
    group_totals: Sequence[float]  # [2 · groups]: sums of losses, then their number; means over ranks
    log: Log  # more numbers of this iteration for `on_metrics`
    stop: Callable[[str], None]  # save and end the run after the next iteration, for this reason


@dataclass(kw_only=True)
class EvalEvent:
    """An evaluation, at --eval-interval. Hooks measure and `log`; those after them see the numbers."""

    iteration: int
    saves: bool  # a checkpoint of this iteration is written in any case
    record: Log
    stop: Callable[[str], None]  # as in a StepEvent
    values: dict[str, float] = field(default_factory=dict)  # measured so far, such as validation/loss
    best: Best | None = None  # set alike on every rank: save this iteration, and name it in best.json

    def log(self, values: Mapping[str, float]) -> None:
        """Add numbers to `values`, and give them to `on_metrics`."""
        self.values |= values
        self.record(values)


@dataclass(frozen=True, kw_only=True)
class SaveEvent:
    """A checkpoint that is complete; with --async-save, iterations after it was begun."""

    iteration: int
    folder: Path  # SAVE/iter_0000010


class Hook:
    """One behaviour beside the iterations: override what it needs.

    Every rank calls every hook, in the order of the list. A hook uses no collective in `on_step`.

    A MindSpeedMMError on one rank ends the run on all ranks, after the next iteration; the hook is not called
    again.
    Any other exception is a bug: it ends its rank at once, with a traceback.
    """

    # True: it does the same on every rank, so that it may use collectives in `on_eval`. Its errors are raised
    # at once.
    alike: ClassVar[bool] = False
    name: str = ""  # what its state is saved under: its `type` in the model JSON, else the name of its class

    def on_start(self, event: StartEvent) -> None:
        """Before the first iteration, after `load_state_dict`."""

    def on_step(self, event: StepEvent) -> None:
        """After every iteration, whether its update was skipped or not."""

    def on_eval(self, event: EvalEvent) -> None:
        """At --eval-interval, after `on_step`."""

    def on_save(self, event: SaveEvent) -> None:
        """When a checkpoint is complete."""

    def on_metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """For each set of numbers that a hook logs, this one included."""

    def close(self) -> None:
        """At the end of the run, also of one that failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in values that JSON has; {} for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`, on the rank that saved it.

        A rank that the checkpoint does not know gets the state of rank 0.
        """
