"""RMS norm over the last dimension: the device's fused op, or the formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.ops import npu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x·rsqrt(mean(x²)+eps)·weight over the last dimension [..., D], computed in fp32, in x's dtype."""
    weight = weight.to(x.dtype)
    if x.device.type == "npu":
        return npu.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by the formula: what every fused version is compared with."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
