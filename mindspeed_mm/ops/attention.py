"""Scaled dot-product attention behind one seam: q, k, v in, output out. The device's fused kernel, or the plain formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.ops import npu

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, N, K], k and v [B, S', N, K] → [B, S, N, K]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, N, K] ×3 → [B, S, N, K], not causal, scale 1/√K, no mask, by the fused kernel of the tensors' device."""
    if q.device.type == "npu":
        return npu.attend(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the formula, softmax in fp32: what every fused kernel is compared with."""
    scores = torch.einsum("bsnk,btnk->bnst", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bnst,btnk->bsnk", scores.softmax(dim=-1), v.float()).to(q.dtype)
