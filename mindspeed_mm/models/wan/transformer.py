"""The Wan transformer block and its parts. Parameter names are the official checkpoint's.

A matrix product runs in the dtype of its weight; norms, modulation, gates and the residual sum are fp32
arithmetic. Legend: B batch · S tokens · D hidden · N heads · K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mindspeed_mm.models.wan.config import WanConfig
from mindspeed_mm.ops.attention import Attend, attend, attend_padded
from mindspeed_mm.ops.norm import rms_norm
from mindspeed_mm.ops.quantized import product_dtype
from mindspeed_mm.ops.rope import apply_rope


class Rope(NamedTuple):
    """Rotary tables of the current tokens."""

    cos: Tensor  # [S, K/2] fp32
    sin: Tensor  # [S, K/2] fp32


class Text(NamedTuple):
    """Embedded caption.

    Zero padding gives equal rows, so the last row is computed once and stands `copies` times.
    """

    rows: Tensor  # [B, L, D]
    copies: int  # ≥ 1


class Linear(nn.Linear):
    """nn.Linear that brings its input to the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PatchEmbedding(nn.Conv3d):
    """[B, C, F, h, w] → tokens [B, S, D].

    The convolution's stride is its kernel, so it is one matrix product.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.kernel_size
        cells = rearrange(x, "b c (f t) (y h) (x w) -> b (f y x) (c t h w)", t=t, h=h, w=w)
        return F.linear(cells.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class RmsNorm(nn.Module):
    """RMS norm over the full width, before the head split."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Affine layer norm in fp32, whatever the dtype of its input and weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class Attention(nn.Module):
    """Projections and query-key norms around `attend`, which may be replaced from outside."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.o = Linear(width, width)
        self.norm_q = RmsNorm(width, config.eps)
        self.norm_k = RmsNorm(width, config.eps)
        self.attend: Attend = attend

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1)


class SelfAttention(Attention):
    """Every token attends to every token; positions enter by rotation of q and k."""

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """[B, S, D] → [B, S, D]."""
        x = x.to(product_dtype(self.q))  # once, for the three products
        q = apply_rope(self._heads(self.norm_q(self.q(x))), rope.cos, rope.sin)
        k = apply_rope(self._heads(self.norm_k(self.k(x))), rope.cos, rope.sin)
        out: Tensor = self.o(self.attend(q, k, self._heads(self.v(x))).flatten(2))
        return out


class CrossAttention(Attention):
    """Every token attends to every caption row, padding rows included.

    The published weights were trained so.
    """

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """[B, S, D] → [B, S, D]; one sample and P captions → [P, S, D]."""
        rows = text.rows.to(product_dtype(self.k))
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(rows)))
        if len(q) != len(k):
            q = q.expand(len(k), -1, -1, -1).contiguous()
        out: Tensor = self.o(
            attend_padded(q, k, self._heads(self.v(rows)), text.copies, self.attend).flatten(2)
        )
        return out


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward on a residual stream, modulated by the timestep."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(width, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(width, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, width)
        )

    def forward(self, x: Tensor, time: Tensor, text: Text, rope: Rope) -> Tensor:
        """x [B, S, D] and time [B, 6, D] fp32 → [B, S, D] in x's dtype.

        One sample may meet P captions: what comes before them is computed once, and [P, S, D] continues from
        there.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).chunk(6, dim=1)
        x = gated_sum(x, gate1, self.self_attn(modulated_norm(x, shift1, scale1, self.eps), rope))
        x = (x + self.cross_attn(self.norm3(x), text)).to(x.dtype)
        return gated_sum(x, gate2, self.ffn(modulated_norm(x, shift2, scale2, self.eps)))


class Head(nn.Module):
    """Tokens → the cells of their patch, in fp32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.hidden_size
        patch_time, patch_height, patch_width = config.patch_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.head = Linear(width, config.out_dim * patch_time * patch_height * patch_width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, S, D] and time [B, D] fp32 → [B, S, out_dim · cells]."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        out: Tensor = self.head(modulated_norm(x, shift, scale, self.eps))
        return out


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x)·(1+scale)+shift in fp32, LN without weights; shift and scale [B, 1, D] fp32."""
    width, scale = x.shape[-1:], 1 + scale
    if scale.shape[0] == 1:  # one timestep: the modulation is the affine part of one fused layer norm
        return F.layer_norm(x.float(), width, scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x.float(), width, eps=eps), scale)


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate·y in fp32, in x's dtype."""
    return torch.addcmul(x.float(), gate, y.float()).to(x.dtype)
