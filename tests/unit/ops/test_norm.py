"""RMS norm: the fused version is the formula, in value and gradient, for every mix of dtypes in the model."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.ops.norm import rms_norm, rms_norm_reference


def inputs(dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 5, 64, generator=generator)).to(dtype).requires_grad_()
    weight = torch.rand(64, generator=generator).add(0.5).to(weight_dtype).requires_grad_()
    return x, weight, torch.randn(2, 5, 64, generator=generator).to(dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_match_the_formula(dtype, weight_dtype):
    x, weight, grad = inputs(dtype, weight_dtype)
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5}
        if dtype == weight_dtype == torch.float32
        else {"atol": 0.05, "rtol": 0.02}
    )
    results = []
    for function in (rms_norm, rms_norm_reference):
        out = function(x, weight, 1e-6)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, (x, weight), grad)))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, **tolerance)


def test_frozen_weight_gets_no_gradient():
    x, weight, grad = inputs(torch.float32, torch.float32)
    weight.requires_grad_(False)
    rms_norm(x, weight, 1e-6).backward(grad)
    assert x.grad is not None
    assert weight.grad is None


def test_torch_agrees():
    x, weight, _ = inputs(torch.float32, torch.float32)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-3), torch.nn.functional.rms_norm(x, (64,), weight, 1e-3), atol=1e-6, rtol=1e-6
    )
