"""Means with bootstrap confidence intervals, and paired differences between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10_000
LEVEL = 0.95
MIN_VALUES = (
    6  # minimum number of values for an interval: by chance, 6 share a sign in 3 % of cases, 5 in 6 %
)


@dataclass(frozen=True)
class Mean:
    """A mean and its interval. `low` and `high` are None for fewer than MIN_VALUES values."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def to_json(self) -> dict[str, Any]:
        """Return the mean as eval.json stores it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}

    @property
    def differs(self) -> bool:
        """Whether the interval is known and does not contain 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_of(values: Sequence[float], seed: int = 0, rounds: int = ROUNDS) -> Mean:
    """Return the mean of one or more values, with its percentile bootstrap interval."""
    array = np.asarray(values, np.float64)
    if len(array) < MIN_VALUES:
        return Mean(float(array.mean()), None, None, len(array))
    low, high = np.quantile(_resampled(array, seed, rounds), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(array.mean()), float(low), float(high), len(array))


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Mean:
    """Return the mean of second - first over pairs. The lists must have the same nonzero length."""
    return mean_of(np.asarray(second, np.float64) - np.asarray(first, np.float64), seed)  # type: ignore[arg-type]


def _resampled(values: NDArray[np.float64], seed: int, rounds: int) -> NDArray[np.float64]:
    """Return the means of `rounds` samples drawn with replacement. Draws in batches to limit memory."""
    generator = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // len(values))
    found = []
    for start in range(0, rounds, at_once):
        count = min(at_once, rounds - start)
        found.append(values[generator.integers(len(values), size=(count, len(values)))].mean(1))
    return np.concatenate(found)
