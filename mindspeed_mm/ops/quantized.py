"""Frozen linear layers with 8-bit weights and one scale per output channel.

Products run in the dtype of the activations; weights are dequantized for each product. fp8 values are stored
as uint8, because gloo does not support float8.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QuantFormat = Literal["int8", "fp8"]
STORED: dict[QuantFormat, torch.dtype] = {"int8": torch.int8, "fp8": torch.uint8}
SCALE = "weight_scale"  # name of the buffer next to `weight`
_LARGEST: dict[QuantFormat, float] = {"int8": 127.0, "fp8": 448.0}
_FP8 = torch.float8_e4m3fn


@torch.no_grad()
def quantize_rows(weight: Tensor, form: QuantFormat) -> tuple[Tensor, Tensor]:
    """Quantize a weight [out, in] to 8-bit values [out, in] and fp32 scales [out].

    Each scale maps the largest magnitude of its row to the end of the range. If a row contains NaN or Inf,
    its scale is NaN or Inf.
    """
    exact = weight.float()
    scale = exact.abs().amax(1) / _LARGEST[form]
    scale = torch.where(scale == 0, 1.0, scale)
    steps = (exact / scale[:, None]).clamp(-_LARGEST[form], _LARGEST[form])
    if form == "int8":
        return steps.nan_to_num(0.0).round().to(torch.int8), scale
    return steps.to(_FP8).view(torch.uint8), scale


@torch.no_grad()
def dequantize(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply 8-bit values [out, in] by their scales [out], rounding once to `dtype`."""
    exact = stored.view(_FP8) if stored.dtype == torch.uint8 else stored
    expanded = exact.to(dtype)  # int8 and e4m3 values are exact in bf16, too
    return torch.mul(expanded, scale[:, None], out=expanded)


class _Product(torch.autograd.Function):
    """Computes x Wᵀ + b. Backward dequantizes the weights again, and returns only the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.dtype = x.dtype
        return F.linear(x, dequantize(stored, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        stored, scale = ctx.saved_tensors
        weight = dequantize(stored, scale, ctx.dtype)
        return grad.to(ctx.dtype) @ weight, None, None, None


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply `layer`, [..., in] → [..., out], in `product_dtype`; its weights may be 8-bit."""
    dtype = product_dtype(layer)
    if layer.weight.dtype == dtype:
        return F.linear(x.to(dtype), layer.weight, layer.bias)
    scale = layer.get_buffer(SCALE)
    product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x.to(dtype), layer.weight, scale, layer.bias
    )
    return product


def exact_weight(layer: nn.Linear) -> Tensor:
    """Return a layer's weight [out, in] in fp32, detached and dequantized."""
    stored = layer.weight.data
    if stored.dtype.is_floating_point:
        return stored.float()
    return dequantize(stored, layer.get_buffer(SCALE), torch.float32)


def product_dtype(layer: nn.Linear) -> torch.dtype:
    """Return the dtype of a layer's products: that of its weight before quantization."""
    dtype = layer.weight.dtype
    if dtype.is_floating_point:
        return dtype
    given = layer.product_dtype
    assert isinstance(given, torch.dtype)
    return given


class QuantizableLinear(nn.Linear):
    """A linear layer whose weight may be 8-bit. It takes over `weight` and `bias` of the layer `base`."""

    def __init__(self, base: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(self, x)


def prepare_8bit_weight(layer: QuantizableLinear, form: QuantFormat) -> None:
    """Prepare a layer for an 8-bit weight, and add the buffer `weight_scale` for its scales."""
    layer.product_dtype = layer.weight.dtype  # type: ignore[assignment]
    weight = torch.empty_like(layer.weight, dtype=STORED[form])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    scale = torch.empty(layer.out_features, dtype=torch.float32, device=weight.device)
    layer.register_buffer(SCALE, scale)


def fill_scale(layer: nn.Linear, weight: Tensor) -> Tensor:
    """Set the scales of a layer from its whole weight [out, in].

    Returns the 8-bit values, of which a rank keeps its part.
    """
    stored, scale = quantize_rows(weight, format_of(layer))
    layer.get_buffer(SCALE).copy_(scale)
    return stored


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Map the names of 8-bit weights to their layers."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.dtype.is_floating_point
    }


def format_of(layer: nn.Linear) -> QuantFormat:
    """Return the 8-bit format of a layer."""
    return "fp8" if layer.weight.dtype == torch.uint8 else "int8"
