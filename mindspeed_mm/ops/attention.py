"""Scaled dot-product attention behind one interface: the device's fused kernel, or the plain formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.ops import npu

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, S, N, K], k and v [B, S', N, K] → [B, S, N, K]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, N, K] ×3 → [B, S, N, K] by the device's fused kernel.

    Not causal, scale 1/√K, no mask.
    """
    if npu.is_on_npu(q):
        return npu.attend(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by the formula, with softmax in fp32: the reference for all fused kernels."""
    scores = torch.einsum("bsnk,btnk->bnst", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bnst,btnk->bsnk", scores.softmax(dim=-1), v.float()).to(q.dtype)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, copies: int, attend_rows: Attend = attend) -> Tensor:
    """Attention to keys whose last row counts `copies` times, as equal padding rows do. k and v hold it once.

    On a CPU, the weight of that row is multiplied instead of repeating the row, which saves most of the work
    for a short caption. Other devices keep their unmasked flash kernels, and another `attend_rows` gets all
    the rows.
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
    """[B, L, ...] → [B, L-1+copies, ...]: the last row `copies` times."""
    return torch.cat((x, x[:, -1:].expand(-1, copies - 1, *x.shape[2:])), dim=1)
