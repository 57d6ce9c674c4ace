"""The sinusoidal embedding of a timestep: fp64 angles, cos first, and no half precision on the way in."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.ops.timestep import sinusoid
from tests.support.errors import raises


def test_it_matches_the_closed_formula():
    timestep = torch.tensor([0.0, 437.25, 1000.0])
    table = sinusoid(timestep, 256)
    assert table.shape == (3, 256)
    assert table.dtype == torch.float32
    for row, t in zip(table.tolist(), timestep.tolist(), strict=True):
        for k in (0, 1, 64, 127):
            angle = t * 10000 ** (-k / 128)
            assert row[k] == pytest.approx(math.cos(angle), abs=6e-8)
            assert row[128 + k] == pytest.approx(math.sin(angle), abs=6e-8)


def test_whole_numbers_and_doubles_are_taken_as_they_are():
    assert torch.equal(sinusoid(torch.tensor([937]), 8), sinusoid(torch.tensor([937.0]), 8))
    assert torch.equal(
        sinusoid(torch.tensor([937.5], dtype=torch.float64), 8), sinusoid(torch.tensor([937.5]), 8)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_timestep_is_rejected(dtype):
    with raises(DataError, "float32"):
        sinusoid(torch.tensor([937.5], dtype=dtype), 256)
