"""`early_stop` ends a run whose held-out loss no longer falls, also over a resume."""

from __future__ import annotations

from typing import Any

import pytest

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.training.hooks.base import EvalEvent
from mindspeed_mm.training.hooks.config import EarlyStopConfig
from mindspeed_mm.training.hooks.early_stop import EarlyStop
from tests.support.errors import raises


def stops_at(hook: EarlyStop, losses: list[float | None]) -> list[int]:
    """The numbers of the evaluations at which it stops the run."""
    found: list[int] = []
    for number, loss in enumerate(losses):
        values = {} if loss is None else {"validation/loss": loss}
        hook.on_eval(
            EvalEvent(
                iteration=number,
                saves=False,
                record=lambda values: None,
                stop=lambda reason, number=number: found.append(number),
                values=values,
            )
        )
    return found


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 2.0, 1.0, 0.5, 0.4], []),
        ([3.0, 2.0, 2.0, 2.1, 1.0], [3]),
        ([3.0, 2.0, 2.5, 1.9, 2.0, 2.0], [5]),
        ([1.0, float("nan"), float("inf")], [2]),
        ([None, None], [1]),
    ],
)
def test_early_stop_waits_for_a_lower_loss(losses: list[float | None], expected: list[int]) -> None:
    assert stops_at(EarlyStop(EarlyStopConfig(patience=2)), losses) == expected


def test_early_stop_counts_no_smaller_gain_than_min_delta() -> None:
    losses: list[float | None] = [3.0, 2.95, 2.92, 2.0, 1.95]
    assert stops_at(EarlyStop(EarlyStopConfig(patience=2, min_delta=0.1)), losses) == [2]


def test_early_stop_counts_on_after_a_resume() -> None:
    losses: list[float | None] = [3.0, 2.0, 2.5, 2.5, 2.5]
    for cut in range(5):
        before, after = (EarlyStop(EarlyStopConfig(patience=3)) for _ in range(2))
        first = stops_at(before, losses[:cut])
        after.load_state_dict(before.state_dict())
        assert [*first, *(cut + number for number in stops_at(after, losses[cut:]))] == [4], cut


@pytest.mark.parametrize("state", [{}, {"best": "x", "waited": 1}, {"best": 1.0, "waited": -1}])
def test_early_stop_rejects_an_invalid_state(state: dict[str, Any]) -> None:
    with raises(WeightsError, "early_stop"):
        EarlyStop(EarlyStopConfig()).load_state_dict(state)
