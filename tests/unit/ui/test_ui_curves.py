"""A run's curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.errors import DataError
from mindspeed_mm.ui.curves import read_curves, smoothed, thinned
from tests.support.errors import raises


def test_curves_are_read_past_damaged_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"iteration": 1, "loss": 2.0, "stepped": true}\nnot json\n{"iteration": 2, "loss": NaN}\n'
        b'{"iteration": 3, "loss": 1, "lr": 1e-4}\n[1]\n{"iteration": 4, "lo'
    )
    assert read_curves(path) == {"loss": [(1, 2.0), (3, 1.0)], "lr": [(3, 1e-4)]}


def test_file_without_metrics_is_rejected(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with raises(DataError, where=path):
        read_curves(path)


def test_smoothing_has_no_bias_at_the_start():
    curve = [(place, 3.0) for place in range(10)]
    assert [value for _, value in smoothed(curve, 0.9)] == pytest.approx([3.0] * 10)
    assert smoothed(curve, 0) is curve


def test_long_curves_are_thinned_and_keep_their_end():
    curve = [(place, float(place)) for place in range(9999)]
    thin = thinned(curve, 100)
    assert len(thin) == 100
    assert thin[-1] == curve[-1]
