"""Weight names and sizes of the UMT5 encoder: the official .pth ⇄ transformers' UMT5EncoderModel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.keymap import KeyMap, Rename

_WHOLE_NUMBERS = (
    "vocab_size",
    "d_model",
    "num_heads",
    "d_kv",
    "d_ff",
    "num_layers",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
# Settings that cannot be inferred from shapes; the same in every published UMT5.
ARITHMETIC: Mapping[str, Any] = {
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "is_decoder": False,
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
}
_ALIASES = {  # transformers accepts both names
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
_LAYER = "encoder.block.{i}.layer"
UMT5_KEY_MAP = KeyMap(
    "transformers",
    [
        Rename("token_embedding.weight", "shared.weight"),
        Rename("norm.weight", "encoder.final_layer_norm.weight"),
        Rename("blocks.{i}.norm1.weight", f"{_LAYER}.0.layer_norm.weight"),
        Rename("blocks.{i}.attn.{qkv}.weight", f"{_LAYER}.0.SelfAttention.{{qkv}}.weight"),
        Rename("blocks.{i}.attn.o.weight", f"{_LAYER}.0.SelfAttention.o.weight"),
        Rename(
            "blocks.{i}.pos_embedding.embedding.weight",
            f"{_LAYER}.0.SelfAttention.relative_attention_bias.weight",
        ),
        Rename("blocks.{i}.norm2.weight", f"{_LAYER}.1.layer_norm.weight"),
        Rename("blocks.{i}.ffn.gate.0.weight", f"{_LAYER}.1.DenseReluDense.wi_0.weight"),
        Rename("blocks.{i}.ffn.fc1.weight", f"{_LAYER}.1.DenseReluDense.wi_1.weight"),
        Rename("blocks.{i}.ffn.fc2.weight", f"{_LAYER}.1.DenseReluDense.wo.weight"),
    ],
)


def umt5_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer UMT5Config's sizes from the shapes in an official file.

    Counts the layers that the file holds, so a wrong config.json cannot make the model too large. Raises
    WeightsError if the file is not a UMT5 encoder.
    """
    try:
        vocab, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        inner, _ = shapes["blocks.0.attn.q.weight"]
        feed_forward, _ = shapes["blocks.0.ffn.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"not a UMT5 encoder: {error} is missing or has another shape",
            fix="use the official models_t5_umt5-xxl-enc-bf16.pth or a folder of transformers",
        ) from None
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "vocab_size": vocab,
        "d_model": width,
        "num_heads": heads,
        "d_kv": inner // max(heads, 1),
        "d_ff": feed_forward,
        "num_layers": len(layers),
        "relative_attention_num_buckets": buckets,
    }


def checked_settings(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Validate a transformers config.json. Raises WeightsError for numbers that no encoder can have."""
    values = {_ALIASES.get(name, name): value for name, value in values.items()}
    for name in _WHOLE_NUMBERS:
        value = values.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise WeightsError(
                f"got {value!r:.40}",
                where=f"{path}: {name}",
                expected="a whole number above 0",
                fix="download the file again",
            )
    eps = values.get("layer_norm_epsilon")
    if eps is not None and (type(eps) is not float or not 0 < eps < 1):
        raise WeightsError(
            f"got {eps!r:.40}", where=f"{path}: layer_norm_epsilon", expected="a number such as 1e-06"
        )
    return values


def is_umt5(names: Collection[str]) -> bool:
    """Return whether these are transformers' names for UMT5, whose layers all have a position bias."""
    stem = f"{_LAYER}.0.SelfAttention.relative_attention_bias.weight"
    layers = {name.split(".")[2] for name in names if name.startswith("encoder.block.")}
    return len(layers) > 1 and all(stem.format(i=layer) in names for layer in layers)
