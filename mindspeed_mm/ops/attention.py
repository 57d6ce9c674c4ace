"""Scaled dot-product attention: the device's fused kernel, or a reference implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.ops import npu

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, N, K], k and v [B, S', N, K] → [B, S, N, K]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with the device's fused kernel: scale 1/√K, no mask, not causal.

    q [B, S, N, K], k and v [B, S', N, K] → [B, S, N, K].
    """
    if npu.is_on_npu(q):
        return npu.attend(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reference implementation of `attend`, with softmax in fp32."""
    scores = torch.einsum("bsnk,btnk->bnst", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bnst,btnk->bsnk", scores.softmax(dim=-1), v.float()).to(q.dtype)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, copies: int, attend_rows: Attend = attend) -> Tensor:
    """Attend to keys whose last row counts `copies` times, like equal padding rows. k and v contain it once.

    On a CPU, the softmax weight of this row is scaled instead, which saves most of the work for a short
    caption. Other devices, and any other `attend_rows`, get the repeated rows, so that they can use flash
    kernels without a mask.
    """
    if copies == 1:
        return attend_rows(q, k, v)
    if q.device.type != "cpu" or attend_rows is not attend:
        return attend_rows(q, repeat_last(k, copies), repeat_last(v, copies))
    weight = torch.zeros(k.shape[1])
    weight[-1] = math.log(copies)
    mask = weight.expand(1, 1, q.shape[1], -1)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def repeat_last(x: Tensor, copies: int) -> Tensor:
    """Repeat the last row so that it occurs `copies` times: [B, L, ...] → [B, L-1+copies, ...]."""
    return torch.cat((x, x[:, -1:].expand(-1, copies - 1, *x.shape[2:])), dim=1)
