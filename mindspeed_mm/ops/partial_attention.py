"""Attention over a part of the keys. Merging the results of all parts gives full attention.

A result consists of the output and the log-sum-exp of the scores, which `merge` uses to combine two results
(online softmax, https://arxiv.org/abs/1805.02867). The gradients of a part are computed from the output and
log-sum-exp of full attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 256  # queries per block of the reference implementation
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class PartialAttention(NamedTuple):
    """Result of attention over some of the keys."""

    out: Tensor  # [B, S, N, K] fp32
    lse: Tensor  # [B, S, N] fp32


def attend_part(q: Tensor, k: Tensor, v: Tensor) -> PartialAttention:
    """Attend q [B, S, N, K] to k and v [B, S', N, K], with a fused kernel on CPU and CUDA."""
    heads = _heads_first(q, k, v)
    if q.device.type == "cpu":
        out, lse = _CPU(*heads)
    elif _has_flash(q):
        out, lse, *_ = _FLASH(*heads)
    else:
        return _by_formula(q, k, v)
    return PartialAttention(out.transpose(1, 2).float(), lse.transpose(1, 2).float())


def merge(first: PartialAttention, second: PartialAttention) -> PartialAttention:
    """Combine the results of two parts."""
    lse = torch.logaddexp(first.lse, second.lse)
    out = first.out * (first.lse - lse).exp()[..., None] + second.out * (second.lse - lse).exp()[..., None]
    return PartialAttention(out, lse)


def part_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v from one part.

    `out` [B, S, N, K] and `lse` [B, S, N] are those of the merged result.
    """
    heads = _heads_first(grad, q, k, v, out)
    rows = lse.transpose(1, 2).contiguous()
    if q.device.type == "cpu":
        found = _CPU_BACKWARD(*heads, rows, 0.0, False)
    elif _has_flash(q):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # for dropout, which is off
        longest = (q.shape[1], k.shape[1])
        found = _FLASH_BACKWARD(*heads, rows, None, None, *longest, 0.0, False, seed, seed[:0])
    else:
        return _gradients_by_formula(grad, q, k, v, out, lse)
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in found)
    return dq, dk, dv


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """Transpose to [B, N, S, K] with contiguous rows, which the kernels require but do not check."""
    return [(t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in tensors]


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _by_formula(q: Tensor, k: Tensor, v: Tensor) -> PartialAttention:
    results = []
    for rows in torch.split(q, _ROWS, 1):
        scores = torch.einsum("bsnk,btnk->bsnt", rows.float(), k.float()) / math.sqrt(q.shape[-1])
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        results.append(PartialAttention(torch.einsum("bsnt,btnk->bsnk", weights, v.float()), lse))
    return PartialAttention(*(torch.cat(parts, 1) for parts in zip(*results, strict=True)))


def _gradients_by_formula(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = 1 / math.sqrt(q.shape[-1])
    keys, values, in_q = k.float(), v.float(), []
    in_k, in_v = torch.zeros_like(keys), torch.zeros_like(values)
    pieces = (torch.split(tensor, _ROWS, 1) for tensor in (grad, q, out, lse))
    for rows_grad, rows, rows_out, rows_lse in zip(*pieces, strict=True):
        above, queries = rows_grad.float(), rows.float()
        scores = torch.einsum("bsnk,btnk->bsnt", queries, keys) * scale
        weights = (scores - rows_lse[..., None]).exp()
        in_v += torch.einsum("bsnt,bsnk->btnk", weights, above)
        inner = (above * rows_out.float()).sum(-1, keepdim=True)
        in_scores = weights * (torch.einsum("bsnk,btnk->bsnt", above, values) - inner) * scale
        in_q.append(torch.einsum("bsnt,btnk->bsnk", in_scores, keys))
        in_k += torch.einsum("bsnt,bsnk->btnk", in_scores, queries)
    return torch.cat(in_q, 1).to(q.dtype), in_k.to(k.dtype), in_v.to(v.dtype)
