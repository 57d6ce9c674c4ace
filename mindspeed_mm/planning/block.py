"""What one transformer block holds while it trains, in bytes of one token. Formulas: docs/guide/plan.md. No torch.

The names of the tensors are those of models/wan/transformer.py: the arithmetic of norms, gates and the residual sum is fp32,
products are in the dtype of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_mm.models.wan.config import WanConfig

_EXACT = 4  # bytes of fp32: norms, gates and their gradients
_IN_FFN = ("ffn.0", "ffn.2")


@dataclass(frozen=True)
class BlockKind:
    """How the weights of one block train, and in which dtypes it computes."""

    trunk: WanConfig
    trained: bool  # all its weights
    is_branch: bool
    product: int  # bytes of a product's dtype
    residual: int  # bytes of the residual stream's dtype
    split: bool = (
        False  # context parallel: attention's result is exchanged after the kernel, which keeps its own
    )
    is_first: bool = False  # of the branch: the sum with the trunk's tokens is a tensor of its own
    several: bool = False  # samples in a micro-batch: the modulation is no longer one affine layer norm
    lora: tuple[tuple[str, int], ...] = ()  # layer in the block, rank


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one token."""

    saved: float  # for backward, beside the block's input
    peak: float  # the most in backward, `saved` included, beside the block's input
    parts: Mapping[str, float]  # of `saved`, by the module inside the block that saves it
    selective: float  # what `selective` keeps of it


def block_bytes(kind: BlockKind) -> BlockBytes:
    """The two moments that can be the highest: the gradient at the gate behind the feed-forward, and inside it."""
    width, ffn, c = kind.trunk.hidden_size, kind.trunk.ffn_dim, kind.product
    adapted = dict(kind.lora)
    reads = {layer: kind.trained or layer in adapted for layer in _LAYERS}  # keeps the layer's input
    gates = _EXACT * kind.trained  # the gate's gradient needs what the gate multiplies
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
    # gradients at the gate: the one that arrives, its product with the answer, its product with the gate
    at_gate = saved - width * after + arriving + width * (2 if kind.trained else 1) * _EXACT
    # inside the feed-forward: of its inner width two gradients without `reads`, else one beside both activations
    inner = 1 if kind.trained else 2
    in_ffn = saved - width * (after + gates) + arriving + inner * c * ffn
    in_ffn += width * c * kind.trained
    parts = {"self_attn": width * self_attn, "cross_attn": width * cross_attn, "ffn": width * narrow + wide}
    statistics = 2 * 4 * kind.trunk.num_heads  # of the softmax, fp32, for each of two attentions
    selective = width * c * (2 + kind.trained) + statistics
    return BlockBytes(saved=saved, peak=max(at_gate, in_ffn), parts=parts, selective=selective)


_LAYERS = (*(f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"), *_IN_FFN)
