"""Ring attention: keys and values pass around a group of ranks while each rank keeps its queries.

https://arxiv.org/abs/2310.01889. While a rank computes with one part of the keys, it receives the next.
In backward, the gradients of a part travel with it and reach its rank after one round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.ops.partial_attention import PartialAttention, attend_part, merge, part_gradients


def ring_attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Attend from this rank's queries to the keys of all ranks of `group`.

    q [B, S, N, K], and k, v [B, P, N, K] with `lengths[r]` valid leading rows on rank r → [B, S, N, K].
    """
    out: Tensor = _Ring.apply(q, k, v, tuple(lengths), group)  # type: ignore[no-untyped-call]
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        result: PartialAttention | None = None
        pair = torch.stack((k, v))
        for step in range(size):
            coming = _RingShift(pair, group) if step < size - 1 else None
            length = lengths[(rank - step) % size]
            if length and q.shape[1]:
                part = attend_part(q, pair[0, :, :length], pair[1, :, :length])
                result = part if result is None else merge(result, part)
            if coming is not None:
                pair = coming.wait()
        if result is None:  # this rank holds only padding
            result = PartialAttention(
                torch.zeros_like(q, dtype=torch.float32), q.new_zeros(q.shape[:3]).float()
            )
        out = result.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, result.lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        rank, size = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        in_q = torch.zeros_like(q, dtype=torch.float32)
        pair = torch.stack((k, v))
        in_pair = torch.zeros_like(pair, dtype=torch.float32)
        homeward: _RingShift | None = None
        for step in range(size):
            coming = _RingShift(pair, ctx.group) if step < size - 1 else None
            length = ctx.lengths[(rank - step) % size]
            found: tuple[Tensor, ...] = ()
            if length and q.shape[1]:
                found = part_gradients(grad, q, pair[0, :, :length], pair[1, :, :length], out, lse)
            if homeward is not None:
                in_pair = homeward.wait()
            if found:
                in_q += found[0]
                in_pair[0, :, :length] += found[1]
                in_pair[1, :, :length] += found[2]
            homeward = _RingShift(in_pair, ctx.group)
            if coming is not None:
                pair = coming.wait()
        assert homeward is not None
        in_k, in_v = homeward.wait().unbind(0)
        return in_q.to(q.dtype), in_k.to(k.dtype), in_v.to(v.dtype), None, None


class _RingShift:
    """An exchange in a ring: a tensor sent to the next rank, and one received from the previous rank."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + way) % size) for way in (1, -1))
        self.sent, self.got = sent.contiguous(), torch.empty_like(sent, memory_format=torch.contiguous_format)
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, after, group),
                dist.P2POp(dist.irecv, self.got, before, group),
            ]
        )

    def wait(self) -> Tensor:
        """Wait, and return the received tensor."""
        for work in self.works:
            work.wait()
        return self.got
