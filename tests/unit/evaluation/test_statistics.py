"""Bootstrap intervals: against the normal's, and what too few values or no difference give."""

from __future__ import annotations

import numpy as np
import pytest

from mindspeed_mm.evaluation.stats import MIN_VALUES, mean_of, paired


def test_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = mean_of(values.tolist())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(2).normal(0, 1, (100, 40))
    covered = sum(not mean_of(draw.tolist()).differs for draw in draws)
    assert 0.86 < covered / 100 < 1


def test_few_values_have_no_interval() -> None:
    found = mean_of([1.0] * (MIN_VALUES - 1))
    assert (found.low, found.high, found.differs) == (None, None, False)
    assert mean_of([1.0] * MIN_VALUES).differs


def test_pairs_show_what_single_means_hide() -> None:
    base = np.random.default_rng(3).normal(0, 50, 20)
    better = base + 1 + np.random.default_rng(4).normal(0, 0.2, 20)
    change = paired(base.tolist(), better.tolist())
    assert change.differs
    assert change.mean == pytest.approx(1, abs=0.2)
    assert mean_of(base.tolist()).high > mean_of(better.tolist()).low  # type: ignore[operator]


def test_equal_runs_show_no_difference() -> None:
    values = [float(n) for n in range(10)]
    assert not paired(values, values).differs


def test_intervals_are_the_same_again() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0]
    assert mean_of(values) == mean_of(values)
