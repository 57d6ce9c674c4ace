"""RMS norm over the last dimension: the device's fused op, or a reference implementation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_mm.ops import npu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x·rsqrt(mean(x²)+eps)·weight over the last dimension in fp32; the result has the dtype of x."""
    weight = weight.to(x.dtype)
    if npu.is_on_npu(x):
        return npu.rms_norm(x, weight, eps)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        normed: Tensor = _CpuRmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Reference implementation of `rms_norm`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class _CpuRmsNorm(torch.autograd.Function):
    """RMS norm for CPUs, where the backward of torch consists of small ops and is five times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        unit = x * inverse
        grad_weight = (
            (grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        )
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        inner = (grad * weight).to(unit.dtype)
        along = torch.einsum("...d,...d->...", inner, unit).unsqueeze(-1) / -x.shape[-1]
        return torch.addcmul(inner, unit, along).mul_(inverse).to(x.dtype), grad_weight, None
