"""Context parallelism (Ulysses).

Each rank holds part of the tokens; in attention, it holds all tokens for part of the heads.
https://arxiv.org/abs/2309.14509. Padding makes any token count divisible. It is removed between the two
all-to-alls, so attention sees only the real tokens and needs no mask. With more ranks than heads, keys and
values also pass around rings between groups that exchange heads (distributed/ring.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.distributed.config import check_context_parallel
from mindspeed_mm.distributed.ring import ring_attend
from mindspeed_mm.ops.attention import Attend


class SharedTokens:
    """The tokens of one sample, split over a group in rank order. A TokenLayout of models.wan.vace.

    It stores the token count of the last split, so that attention can remove the padding. A forward must
    therefore be followed by its own backward, as in training and in sampling.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.length = 0

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part of the tokens along `dim`, zero-padded to the same size on all ranks."""
        self.length = x.shape[dim]
        part = -(-self.length // self.size)
        return _pad(x, dim, part * self.size).narrow(dim, self.rank * part, part)

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """Gather the parts along `dim` to all `length` tokens on every rank.

        Every rank then computes the same loss. Backward sums the equal gradients of this group, because
        gradients are averaged over data and context ranks; the result is the average over the data ranks.
        """
        joined: Tensor = _Join.apply(x, dim, self)  # type: ignore[no-untyped-call]
        return joined.narrow(dim, 0, length)


class UlyssesAttend:
    """An Attend over all tokens that exchanges heads for tokens and back."""

    def __init__(self, tokens: SharedTokens, attend: Attend) -> None:
        self.tokens = tokens
        self.attend = attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, S/cp, N, K] → [B, S/cp, N, K]."""
        group, length = self.tokens.group, self.tokens.length
        mixed = _exchange(torch.stack((q, k, v)), 3, 2, group)[:, :, :length]  # 3 B S N/cp K
        out = self.attend(*mixed.unbind(0))
        return _exchange(_pad(out, 1, q.shape[1] * self.tokens.size), 1, 2, group)


class HybridAttend:
    """An Attend over all tokens: Ulysses within groups of neighbouring ranks, and a ring between the groups.

    Each member of a ring holds the tokens of its group in rank order. The last member's tokens end in
    padding.
    """

    def __init__(self, tokens: SharedTokens, ulysses: dist.ProcessGroup, ring: dist.ProcessGroup) -> None:
        self.tokens, self.ulysses, self.ring = tokens, ulysses, ring

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, S/cp, N, K] → [B, S/cp, N, K]."""
        size = q.shape[1] * dist.get_world_size(self.ulysses)  # tokens of a ring member, with padding
        places = range(0, size * dist.get_world_size(self.ring), size)
        lengths = [min(max(self.tokens.length - first, 0), size) for first in places]
        mixed = torch.stack((q, k, v))
        if size > q.shape[1]:
            mixed = _exchange(mixed, 3, 2, self.ulysses)  # 3 B S/ring N/ulysses K
        q, k, v = mixed.unbind(0)
        out = ring_attend(q[:, : lengths[dist.get_rank(self.ring)]], k, v, lengths, self.ring)
        out = _pad(out, 1, size)
        return _exchange(out, 1, 2, self.ulysses) if dist.get_world_size(self.ulysses) > 1 else out


def apply_context_parallel(
    model: nn.Module,
    group: dist.ProcessGroup,
    *,
    ulysses: dist.ProcessGroup | None = None,
    ring: dist.ProcessGroup | None = None,
) -> SharedTokens | None:
    """Split the tokens of `model` (a VaceTransformer) over `group`. A single rank: no change, returns None.

    `ulysses` and `ring` are the two dimensions of `group`, if it has more ranks than Ulysses can use. Only
    self-attention communicates: cross-attention reads the caption, which every rank has. Raises ConfigError
    if the ranks do not divide the heads.
    """
    if dist.get_world_size(group) == 1:
        return None
    tokens = SharedTokens(group)
    ulysses = ulysses or group
    blocks = [*model.get_submodule("blocks").children(), *model.get_submodule("vace_blocks").children()]
    for block in blocks:
        attention: Any = block.self_attn
        check_context_parallel(attention.num_heads, dist.get_world_size(ulysses))
        if ring is not None:
            attention.attend = HybridAttend(tokens, ulysses, ring)
        else:
            attention.attend = UlyssesAttend(tokens, attention.attend)
    model.tokens = tokens  # type: ignore[assignment]
    return tokens


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def _exchange(x: Tensor, scatter: int, gather: int, group: dist.ProcessGroup) -> Tensor:
    out: Tensor = _Exchange.apply(x, scatter, gather, group)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """All-to-all that splits dimension `scatter` over the group and gathers `gather` in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: int, gather: int, group: dist.ProcessGroup) -> Tensor:
        ctx.scatter, ctx.gather, ctx.group = scatter, gather, group
        return _all_to_all(x, scatter, gather, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.gather, ctx.scatter, ctx.group), None, None, None


def _all_to_all(x: Tensor, scatter: int, gather: int, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    sent = torch.stack(x.chunk(size, dim=scatter))  # stack also makes each rank's part contiguous
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return torch.cat(got.unbind(0), dim=gather)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, tokens: SharedTokens) -> Tensor:
        ctx.dim, ctx.tokens, ctx.part = dim, tokens, x.shape[dim]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(tokens.size)]
        dist.all_gather(parts, x.contiguous(), group=tokens.group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens = ctx.tokens
        return grad.narrow(ctx.dim, tokens.rank * ctx.part, ctx.part) * tokens.size, None, None
