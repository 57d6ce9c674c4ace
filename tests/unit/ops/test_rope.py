"""Rotary embedding: three axes share a head's channels, pairs are adjacent, positions count from 0."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.ops.rope import apply_rope, apply_rope_reference, rope_tables
from tests.support.errors import raises

CPU = torch.device("cpu")


def test_angle_of_a_pair_is_its_axis_position_times_its_rate():
    cos, sin = rope_tables((3, 4, 5), (44, 42, 42), CPU)
    assert cos.shape == sin.shape == (60, 64)
    assert cos.dtype == torch.float32
    f, h, w = 2, 3, 1
    token = (f * 4 + h) * 5 + w
    for pair, (position, j, dim) in {
        0: (f, 0, 44),
        21: (f, 21, 44),
        22: (h, 0, 42),
        43: (w, 0, 42),
        60: (w, 17, 42),
    }.items():
        angle = position * 10000 ** (-2 * j / dim)
        assert cos[token, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[token, pair].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_far_positions_keep_fp64_angles():
    cos, _ = rope_tables((1024, 1, 1), (44, 42, 42), CPU)
    assert cos[1023, 1].item() == pytest.approx(math.cos(1023 * 10000 ** (-2 / 44)), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_rotation_matches_the_formula_with_its_gradient(dtype):
    cos, sin = rope_tables((2, 3, 2), (8, 4, 4), CPU)
    x = torch.randn(2, 12, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    results = []
    for function in (apply_rope, apply_rope_reference):
        out = function(x, cos, sin)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out.float().pow(3).sum(), x)))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)


def test_scores_depend_on_the_distance_of_positions_only():
    cos, sin = rope_tables((9, 1, 1), (12, 2, 2), CPU)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    q, k = (apply_rope(x.expand(1, 9, 1, 16), cos, sin)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-8, 9):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert scores[8, 0] != scores[0, 8]


def test_grid_beyond_the_models_positions_is_rejected():
    with raises(DataError, "1025, 2, 2", 1024):
        rope_tables((1025, 2, 2), (44, 42, 42), CPU)
