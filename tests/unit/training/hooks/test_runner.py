"""The events that a hook receives, the effect of its failure, and the state that a checkpoint keeps."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.errors import TrainingError
from mindspeed_mm.training.hooks.base import EvalEvent, Hook, StepEvent
from mindspeed_mm.training.hooks.runner import HookRunner, by_name
from mindspeed_mm.training.rank_status import RankStatus
from tests.support.errors import raises
from tests.support.hooks import Probe, ProbeConfig
from tests.support.loops import Recorder, trainer, training
from tests.support.tiny import tiny_transformer

pytestmark = pytest.mark.medium


class Saves:
    """Stands for a Checkpointer that saves in the background: a save is complete at the next poll."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.pending: int | None = None

    def save(self, state: Any, best: Any = None) -> int | None:
        done, self.pending = self.pending, state.iteration
        self.states.append(state.hooks)
        return done

    def poll(self) -> int | None:
        done, self.pending = self.pending, None
        return done

    wait = poll


def test_hook_sees_start_steps_evaluations_and_saves(tmp_path: Path) -> None:
    config = training(
        batch={"train_iters": 4},
        eval={"eval_interval": 2},
        checkpoint={"save": str(tmp_path), "save_interval": 3},
    )
    probe = Probe()
    trainer(
        tiny_transformer(),
        config,
        evaluate=lambda: {"validation/loss": 0.5},
        checkpoints=Saves(),
        hooks=[probe],
    ).run()
    loss = {"validation/loss": 0.5}
    assert probe.calls == [
        ("start", 0, 7),
        ("step", 1, 2, 2),
        ("step", 2, 4, 2),
        ("eval", 2, loss, False),
        ("step", 3, 6, 2),
        ("save", 3, "iter_0000003"),
        ("step", 4, 8, 2),
        ("eval", 4, loss, True),
        ("save", 4, "iter_0000004"),
        ("close",),
    ]


def test_numbers_of_a_hook_reach_the_writers() -> None:
    recorder, probe, config = Recorder(), Probe(), training(batch={"train_iters": 2})
    trainer(tiny_transformer(), config, writers=[recorder], hooks=[probe]).run()
    losses = [values["loss"] for _, values in recorder.rows if "loss" in values]
    logged = [(iteration, values) for iteration, values in recorder.rows if "probe/mean" in values]
    assert logged == [(1, {"probe/mean": losses[0]}), (2, {"probe/mean": 0.7 * losses[0] + losses[1]})]


def test_failed_hook_is_called_no_more_and_ends_the_run() -> None:
    failing, other = Probe(ProbeConfig(fail_at=2)), Probe()
    config = training(batch={"train_iters": 9})
    with raises(TrainingError, "probe", where="rank 0"):
        trainer(tiny_transformer(), config, hooks=[failing, other]).run()
    steps = [[call[1] for call in probe.calls if call[0] == "step"] for probe in (failing, other)]
    assert steps == [[1, 2], [1, 2]]
    assert failing.calls[-1] == other.calls[-1] == ("close",)


def test_hook_stops_the_run_after_the_next_iteration(tmp_path: Path) -> None:
    saves, probe = Saves(), Probe(ProbeConfig(stop_at=2))
    config = training(batch={"train_iters": 9}, checkpoint={"save": str(tmp_path)})
    run = trainer(tiny_transformer(), config, checkpoints=saves, hooks=[probe])
    run.run()
    assert run.state.iteration == 3
    assert ("save", 3, "iter_0000003") in probe.calls


def test_error_of_identical_hooks_is_raised_immediately() -> None:
    class Alike(Probe):
        alike = True

    after = Probe()
    config = training(batch={"train_iters": 9})
    with raises(TrainingError, "probe"):
        trainer(tiny_transformer(), config, hooks=[Alike(ProbeConfig(fail_at=2)), after]).run()
    assert [call[1] for call in after.calls if call[0] == "step"] == [1]


def test_state_is_loaded_by_name_before_the_start(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    first, second = Probe(), Probe()
    second.name = "mine"
    config = training(batch={"train_iters": 1})
    run = trainer(tiny_transformer(), config, hooks=[first, second])
    run.state.hooks = {"mine": {"mean": 2.5}, "gone": {"a": 1}, "away": {}}
    with caplog.at_level(logging.INFO, "mindspeed_mm"):
        run.run()
    assert second.calls[:2] == [("load", {"mean": 2.5}), ("start", 0, 7)]
    assert first.calls[0] == ("start", 0, 7)
    notes = {record.getMessage() for record in caplog.records if "gone" in record.getMessage()}
    assert len(notes) == 1
    assert "away" in notes.pop()


def test_hooks_of_one_name_are_numbered() -> None:
    named = Probe()
    named.name = "mine"
    assert list(by_name([Probe(), named, Probe(), Probe()])) == ["Probe", "mine", "Probe#2", "Probe#3"]


class Holder(Hook):
    """A hook whose state is its argument."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.state}


@pytest.mark.parametrize("state", [math.nan, (1, 2), {1: "a"}, object(), "x" * (1 << 20), "\ud800"])
def test_state_that_a_checkpoint_cannot_give_back_is_rejected(state: Any) -> None:
    with raises(TrainingError, where="state_dict of the hook Holder"):
        HookRunner([Holder(state)], RankStatus()).states()


def test_state_of_plain_values_is_kept_and_no_state_is_none() -> None:
    state = {"a": [1, 2.5, None, True, "é"], "b": {"c": 1e-320}}
    assert HookRunner([Holder(state), Hook()], RankStatus()).states() == {"Holder": {"kept": state}}
    assert HookRunner([Hook()], RankStatus()).states() == {}


def test_later_hooks_see_what_earlier_ones_measured() -> None:
    class Measures(Hook):
        def on_eval(self, event: EvalEvent) -> None:
            event.log({"validation/mine": 1.0})

    config, probe, recorder = (
        training(batch={"train_iters": 1}, eval={"eval_interval": 1}),
        Probe(),
        Recorder(),
    )
    trainer(tiny_transformer(), config, writers=[recorder], hooks=[Measures(), probe]).run()
    assert ("eval", 1, {"validation/mine": 1.0}, True) in probe.calls
    assert (1, {"validation/mine": 1.0}) in recorder.rows


def test_other_exceptions_of_a_hook_are_not_hidden() -> None:
    class Broken(Hook):
        def on_step(self, event: StepEvent) -> None:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        trainer(tiny_transformer(), training(), hooks=[Broken()]).run()
