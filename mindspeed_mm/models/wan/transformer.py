"""The Wan transformer block and its layers. Parameter names follow the official checkpoint.

Matrix products run in the dtype of their weight. Norms, modulation, gates and the residual sum are computed
in fp32. Shapes: B batch, S tokens, D hidden size, N heads, K head dimension.
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
    """Rotary tables for this rank's tokens."""

    cos: Tensor  # [S, K/2] fp32
    sin: Tensor  # [S, K/2] fp32


class Text(NamedTuple):
    """Embedded caption.

    All zero-padding rows are equal, so only one is stored: the last row counts `copies` times.
    """

    rows: Tensor  # [B, L, D]
    copies: int  # ≥ 1


class Linear(nn.Linear):
    """nn.Linear that casts its input to the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PatchEmbedding(nn.Conv3d):
    """Embeds patches [B, C, F, h, w] as tokens [B, S, D].

    The stride equals the kernel size, so the convolution is computed as one matrix product.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        t, h, w = self.kernel_size
        cells = rearrange(x, "b c (f t) (y h) (x w) -> b (f y x) (c t h w)", t=t, h=h, w=w)
        return F.linear(cells.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class RmsNorm(nn.Module):
    """RMS norm over the hidden size, applied before the split into heads."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Affine layer norm that always computes in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class Attention(nn.Module):
    """Projections and query-key norms around `attend`, a kernel that can be replaced."""

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
    """Self-attention over all tokens, with rotary position embeddings on q and k."""

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        x = x.to(product_dtype(self.q))  # cast once for the three products
        q = apply_rope(self._heads(self.norm_q(self.q(x))), rope.cos, rope.sin)
        k = apply_rope(self._heads(self.norm_k(self.k(x))), rope.cos, rope.sin)
        out: Tensor = self.o(self.attend(q, k, self._heads(self.v(x))).flatten(2))
        return out


class CrossAttention(Attention):
    """Cross-attention from the tokens to the caption, including its padding rows.

    The published weights were trained without a mask.
    """

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """Map [B, S, D] to [B, S, D], or one sample with P captions to [P, S, D]."""
        rows = text.rows.to(product_dtype(self.k))
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(rows)))
        if len(q) != len(k):
            q = q.expand(len(k), -1, -1, -1).contiguous()
        out: Tensor = self.o(
            attend_padded(q, k, self._heads(self.v(rows)), text.copies, self.attend).flatten(2)
        )
        return out


class WanBlock(nn.Module):
    """Residual block of self-attention, cross-attention and feed-forward, modulated by the timestep."""

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
        """Map x [B, S, D] and time [B, 6, D] fp32 to [B, S, D] in x's dtype.

        With one sample and P captions, self-attention runs once, and cross-attention expands x to [P, S, D].
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).chunk(6, dim=1)
        x = gated_sum(x, gate1, self.self_attn(modulated_norm(x, shift1, scale1, self.eps), rope))
        x = (x + self.cross_attn(self.norm3(x), text)).to(x.dtype)
        return gated_sum(x, gate2, self.ffn(modulated_norm(x, shift2, scale2, self.eps)))


class Head(nn.Module):
    """Output layer: projects each token to the values of its patch."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.hidden_size
        patch_time, patch_height, patch_width = config.patch_size
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.head = Linear(width, config.out_dim * patch_time * patch_height * patch_width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map x [B, S, D] and time [B, D] fp32 to [B, S, out_dim · patch size]."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        out: Tensor = self.head(modulated_norm(x, shift, scale, self.eps))
        return out


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute LN(x)·(1+scale)+shift in fp32, where LN has no weights; shift and scale are [B, 1, D] fp32."""
    width, scale = x.shape[-1:], 1 + scale
    if scale.shape[0] == 1:  # with one timestep, a fused layer norm can apply the modulation
        return F.layer_norm(x.float(), width, scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x.float(), width, eps=eps), scale)


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Compute x + gate·y in fp32, and return it in the dtype of x."""
    return torch.addcmul(x.float(), gate, y.float()).to(x.dtype)
