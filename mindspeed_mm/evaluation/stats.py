"""Means with bootstrap intervals, and paired differences of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10_000
LEVEL = 0.95
LEAST = 6  # fewest values for an interval: by chance, six values share a sign in 3 % of cases, five in 6 %


@dataclass(frozen=True)
class Mean:
    """A mean and its interval; low and high are None for fewer than LEAST values."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def to_json(self) -> dict[str, Any]:
        """As eval.json holds it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}

    @property
    def differs(self) -> bool:
        """Whether the interval is known and does not contain 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_of(values: Sequence[float], seed: int = 0, rounds: int = ROUNDS) -> Mean:
    """The mean of at least one value, with its percentile bootstrap interval."""
    array = np.asarray(values, np.float64)
    if len(array) < LEAST:
        return Mean(float(array.mean()), None, None, len(array))
    low, high = np.quantile(_resampled(array, seed, rounds), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Mean(float(array.mean()), float(low), float(high), len(array))


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Mean:
    """The mean of second - first over pairs; the lists have equal lengths of at least one."""
    return mean_of(np.asarray(second, np.float64) - np.asarray(first, np.float64), seed)  # type: ignore[arg-type]


def _resampled(values: NDArray[np.float64], seed: int, rounds: int) -> NDArray[np.float64]:
    """Means of samples drawn with replacement, in batches."""
    generator = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // len(values))
    found = []
    for start in range(0, rounds, at_once):
        count = min(at_once, rounds - start)
        found.append(values[generator.integers(len(values), size=(count, len(values)))].mean(1))
    return np.concatenate(found)
