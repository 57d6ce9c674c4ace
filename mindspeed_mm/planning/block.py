"""Memory of one transformer block in training, in bytes per token. Does not import torch.

docs/guide/plan.md explains the formulas. Tensors are named as in models/wan/transformer.py. Norms, gates and
the residual sum are computed in fp32, matrix products in the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_mm.models.wan.config import WanConfig

_EXACT = 4  # bytes of an fp32 value, for norms, gates and their gradients
_IN_FFN = ("ffn.0", "ffn.2")


@dataclass(frozen=True)
class BlockKind:
    """The properties of a block that determine its memory."""

    trunk: WanConfig
    trained: bool  # whether all its weights are trainable
    is_branch: bool
    product: int  # bytes of a product's dtype
    residual: int  # bytes of the residual stream's dtype
    # context parallel: the output of attention is exchanged, and the kernel keeps its own copy
    split: bool = False
    is_first: bool = False  # the first branch block: its sum with the trunk's tokens is a separate tensor
    several: bool = False  # several samples in a micro-batch: the modulation is not a fused layer norm
    lora: tuple[tuple[str, int], ...] = ()  # (layer in the block, rank)


@dataclass(frozen=True)
class BlockBytes:
    """Memory of a block in bytes per token."""

    saved: float  # saved for backward, without the block's input
    peak: float  # peak in backward, including `saved`, without the block's input
    parts: Mapping[str, float]  # `saved` of each module in the block
    selective: float  # the part of `saved` that `selective` keeps


def block_bytes(kind: BlockKind) -> BlockBytes:
    """Compute the memory of a block.

    The peak is either at the gate after the feed-forward or inside the feed-forward.
    """
    width, ffn, c = kind.trunk.hidden_size, kind.trunk.ffn_dim, kind.product
    adapted = dict(kind.lora)
    reads = {layer: kind.trained or layer in adapted for layer in _LAYERS}  # keeps the layer's input
    gates = _EXACT * kind.trained  # the gradient of the gate needs its input
    kernel = 4 * c  # q, k, v and the result
    self_attn = 2 * c + kernel + c * any(reads[f"self_attn.{name}"] for name in "qkv")
    self_attn += c * (kind.split and reads["self_attn.o"])
    cross_attn = 3 * c + c * reads["cross_attn.q"]  # q before and after its norm, the result
    narrow = c * reads["ffn.0"]
    wide = c * ffn * (1 + reads["ffn.2"])
    norms = 2 * _EXACT + _EXACT * (kind.residual < _EXACT)  # the sums after attention; the input in fp32
    norms += 2 * _EXACT * (kind.trained and kind.several)
    after = c * (kind.trained and kind.is_branch)
    joined = (kind.residual + c * kind.trained) * kind.is_first
    low_rank = c * sum(adapted.values())
    saved = width * (self_attn + cross_attn + narrow + norms + 2 * gates + after + joined) + wide + low_rank
    arriving = width * _EXACT
    # gradients at the gate: the incoming one, its product with the output, its product with the gate
    at_gate = saved - width * after + arriving + width * (2 if kind.trained else 1) * _EXACT
    # inside the feed-forward, at its inner width: two gradients without `reads`, else one and both
    # activations
    inner = 1 if kind.trained else 2
    in_ffn = saved - width * (after + gates) + arriving + inner * c * ffn
    in_ffn += width * c * kind.trained
    parts = {"self_attn": width * self_attn, "cross_attn": width * cross_attn, "ffn": width * narrow + wide}
    statistics = 2 * 4 * kind.trunk.num_heads  # log-sum-exp of the softmax, fp32, for both attentions
    selective = width * c * (2 + kind.trained) + statistics
    return BlockBytes(saved=saved, peak=max(at_gate, in_ffn), parts=parts, selective=selective)


_LAYERS = (*(f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"), *_IN_FFN)
