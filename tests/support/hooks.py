"""A training hook that does what a test asks for."""

from __future__ import annotations

from typing import Any, Literal

from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import TrainingError
from mindspeed_mm.log import rank
from mindspeed_mm.training.hooks.base import EvalEvent, Hook, SaveEvent, StartEvent, StepEvent
from mindspeed_mm.training.hooks.config import TRAINING_HOOKS, HookSpec


class ProbeConfig(Config):
    """Where and when the probe fails or stops."""

    type: Literal["probe"] = "probe"
    on_rank: int = 0
    fail_at: int | None = None
    stop_at: int | None = None


class Probe(Hook):
    """Notes each call; its state is a mean that hangs on every loss so far, and on the rank."""

    def __init__(self, config: ProbeConfig | None = None) -> None:
        self.config = config or ProbeConfig()
        self.calls: list[tuple[Any, ...]] = []
        self.mean = 0.0

    def on_start(self, event: StartEvent) -> None:
        self.calls.append(("start", event.state.iteration, event.config.batch.seed))

    def on_step(self, event: StepEvent) -> None:
        report = event.report
        self.calls.append(("step", report.iteration, report.consumed_samples, len(event.notes)))
        self.mean = 0.7 * self.mean + report.loss + rank()
        if rank() == self.config.on_rank:
            if report.iteration == self.config.fail_at:
                raise TrainingError("the probe failed", where=f"rank {rank()}")
            if report.iteration == self.config.stop_at:
                event.stop("the probe stops")
        event.log({"probe/mean": self.mean})

    def on_eval(self, event: EvalEvent) -> None:
        self.calls.append(("eval", event.iteration, dict(event.values), event.saves))

    def on_save(self, event: SaveEvent) -> None:
        self.calls.append(("save", event.iteration, event.folder.name))

    def close(self) -> None:
        self.calls.append(("close",))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "rank": rank()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append(("load", state))
        self.mean = state["mean"]


def register_probe() -> None:
    """Make {"type": "probe"} known in this process."""
    if "probe" not in TRAINING_HOOKS:
        TRAINING_HOOKS.add("probe", HookSpec(config=ProbeConfig, build="tests.support.hooks:Probe"))
