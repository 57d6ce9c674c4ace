"""The LoRA in a training checkpoint: matrices among the weights, scales in the entry `adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import parse_json
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.lora.adapter import Pair

ENTRY = "adapter"  # next to `model` and `base`: JSON with `type` and `scales` (module → scale)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # suffixes of the layer's name


def theirs_of(key_map: KeyMap, name: str) -> str:
    """Apply `KeyMap.to_theirs` to a model with LoRA layers. Raises WeightsError in the same cases."""
    for ending in (DOWN, UP):
        if name.endswith(ending):
            layer = key_map.to_theirs(f"{name.removesuffix(ending)}.weight")
            return layer.removesuffix(".weight") + ending
    return key_map.to_theirs(name)


def read_scales(entry: object, where: object) -> dict[str, float]:
    """Map official layer names to scales. Raises WeightsError unless training could have written `entry`."""
    found = parse_json(entry, f"{where}: {ENTRY}", WeightsError) if isinstance(entry, str) else None
    scales = found.get("scales") if isinstance(found, dict) and found.get("type") == "lora" else None
    if not isinstance(scales, dict) or any(
        isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0
        for scale in scales.values()
    ):
        raise WeightsError(
            "got something else", where=f"{where}: {ENTRY}", expected="the scale of every LoRA layer"
        )
    return {str(name): float(scale) for name, scale in scales.items()}


def split_lora(
    tensors: Mapping[str, TensorFile], extras: Mapping[str, Any], where: object, key_map: KeyMap
) -> tuple[dict[str, TensorFile], dict[str, Pair]]:
    """Split a checkpoint into its base weights and its LoRA, keyed by the official names of changed weights.

    Raises WeightsError if a matrix or a scale is missing.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith((DOWN, UP))}
    if ENTRY not in extras or len(rest) == len(tensors):
        return dict(tensors), {}
    scales = read_scales(extras[ENTRY], where)
    pairs: dict[str, Pair] = {}
    layers = {name.removesuffix(DOWN).removesuffix(UP) for name in tensors.keys() - rest.keys()}
    for layer in sorted(layers):
        weight = key_map.to_ours(f"{layer}.weight")
        down, up = tensors.get(layer + DOWN), tensors.get(layer + UP)
        scale = scales.get(weight.removesuffix(".weight"))
        if down is None or up is None or scale is None:
            missing = "a scale" if scale is None else DOWN if down is None else UP
            raise WeightsError(f"{layer} has no {missing}", where=str(where), fix="copy the checkpoint again")
        pairs[weight] = Pair(down, up, scale)
    return rest, pairs
