"""Reads the curves of a run from its metrics.jsonl. Does not import torch or gradio."""

from __future__ import annotations

import json
import math
from pathlib import Path

from mindspeed_mm.errors import DataError
from mindspeed_mm.files import regular_file

Curve = list[tuple[int, float]]  # iteration, value
_POINTS = 2000  # maximum points of a curve; more would not be visible at the width of a screen


def read_curves(path: Path) -> dict[str, Curve]:
    """Return the curve of every metric of a run, by name. Skips damaged lines. Raises DataError."""
    curves: dict[str, Curve] = {}
    try:
        with regular_file(path, DataError).open("rb") as lines:
            for line in lines:
                for name, iteration, value in _numbers(line):
                    curves.setdefault(name, []).append((iteration, value))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    if not curves:
        raise DataError("contains no metrics", where=path, expected="the metrics.jsonl of a training run")
    return curves


def _numbers(line: bytes) -> list[tuple[str, int, float]]:
    try:
        row = json.loads(line)
        iteration = row.pop("iteration")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    if type(iteration) is not int:
        return []
    return [
        (name, iteration, float(value))
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def smoothed(curve: Curve, share: float) -> Curve:
    """Smooth a curve with a bias-corrected exponential moving average of decay `share`."""
    if share <= 0:
        return curve
    found, mean, weight = [], 0.0, 0.0
    for iteration, value in curve:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        found.append((iteration, mean / weight))
    return found


def thinned(curve: Curve, max_points: int = _POINTS) -> Curve:
    """Return at most `max_points` evenly spaced points, including the last."""
    if len(curve) <= max_points:
        return curve
    step = len(curve) / max_points
    return [curve[min(len(curve) - 1, math.ceil((index + 1) * step) - 1)] for index in range(max_points)]
