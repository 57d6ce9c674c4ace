"""Fused ops of Ascend NPUs. torch_npu is imported on the first call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_ROTARY_BATCH = 1000  # upper limit of batch · heads in interleave mode


def is_on_npu(x: Tensor) -> bool:
    """Return whether x is on an NPU."""
    return x.device.type == "npu"


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with npu_fusion_attention, [B, S, N, K] → [B, S, N, K] (its layout BSND)."""
    import torch_npu

    out: Tensor = torch_npu.npu_fusion_attention(
        q, k, v, q.shape[2], "BSND", scale=1.0 / math.sqrt(q.shape[-1])
    )[0]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMS norm over the last dimension with npu_rms_norm, which uses fp32 internally."""
    import torch_npu

    out: Tensor = torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return out


def can_rotate(x: Tensor) -> bool:
    """Return whether npu_rotary_mul accepts x [B, S, N, K]."""
    return x.shape[0] * x.shape[2] < MAX_ROTARY_BATCH


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [B, S, N, K] with npu_rotary_mul; cos and sin are [S, K/2]."""
    import torch_npu

    pairs = [torch.repeat_interleave(table, 2, dim=-1)[None, :, None, :] for table in (cos, sin)]
    out: Tensor = torch_npu.npu_rotary_mul(x.float(), pairs[0], pairs[1], rotary_mode="interleave")
    return out.to(x.dtype)
