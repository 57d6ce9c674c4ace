"""8-bit weights: how far a product is off, its gradient, and what rounding does with odd rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mindspeed_mm.ops.quantized import (
    SCALE,
    QuantFormat,
    QuantizableLinear,
    dequantize,
    fill_scale,
    prepare_8bit_weight,
    quantize_rows,
)

BOUNDS = {"int8": 0.01, "fp8": 0.03}  # of the norm of a product, normal weights


def layer(form: QuantFormat, dtype: torch.dtype = torch.float32) -> tuple[QuantizableLinear, nn.Linear]:
    """A layer in 8 bits, and the one that it was."""
    exact = nn.Linear(256, 96).to(dtype)
    nn.init.normal_(exact.weight, std=0.05)
    held = QuantizableLinear(exact)
    prepare_8bit_weight(held, form)
    held.weight.data.copy_(fill_scale(held, exact.weight))
    return held, exact


@pytest.mark.parametrize("form", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_error_is_only_rounding(form: QuantFormat, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    held, exact = layer(form, dtype)
    x = torch.randn(3, 40, 256)
    found, expected = held(x), exact(x.to(dtype))
    assert found.dtype == dtype
    assert held.weight.dtype.itemsize == 1
    assert held.get_buffer(SCALE).dtype == torch.float32
    assert ((found - expected).float().norm() / expected.float().norm()).item() < BOUNDS[form]


@pytest.mark.parametrize("form", BOUNDS)
def test_gradient_matches_the_expanded_weights(form: QuantFormat) -> None:
    torch.manual_seed(1)
    held, _ = layer(form)
    plain = nn.Linear(256, 96)
    plain.weight.data = dequantize(held.weight, held.get_buffer(SCALE), torch.float32)
    plain.bias.data = held.bias.data
    x, y = (torch.randn(5, 256, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in "ab")
    held(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert held.weight.grad is None


@pytest.mark.parametrize("form", BOUNDS)
def test_each_row_has_its_own_scale(form: QuantFormat) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    weight[1] *= 1e4
    weight[2] = 0
    stored, scale = quantize_rows(weight, form)
    error = (dequantize(stored, scale, torch.float32) - weight).norm(dim=1)
    assert (error <= 0.03 * weight.norm(dim=1)).all()
    largest = weight.abs().amax(1)
    torch.testing.assert_close(dequantize(stored, scale, torch.float32).abs().amax(1), largest)


@pytest.mark.parametrize("form", BOUNDS)
def test_row_with_nan_has_a_nan_scale(form: QuantFormat) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = float("nan")
    _, scale = quantize_rows(weight, form)
    assert torch.isfinite(scale).tolist() == [True, False]
