"""Infer a model's sizes from its weight shapes and its config.json. Does not import torch.

Shapes take precedence. config.json must agree with them, and supplies the sizes that shapes do not determine:
num_heads, text_len, eps and vace_layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig, WanConfig
from mindspeed_mm.models.wan.config_json import (
    check_hints,
)
from mindspeed_mm.models.wan.shapes import Shape, sizes_of_shapes

HEAD_WIDTH = 128  # in every published Wan; used when no config.json gives num_heads


def infer_config(shapes: Mapping[str, Shape], hints: Mapping[str, Any]) -> VaceConfig:
    """Infer sizes from the shapes, and the other sizes from `hints` (see `read_hints`).

    Raises WeightsError if sizes are unknown or contradict each other.
    """
    check_hints(shapes, hints)
    sizes = sizes_of_shapes(shapes)
    del sizes["branch_blocks"]
    vace_in_dim = sizes.pop("vace_in_dim", WAN.context_channels)
    sizes.update({name: hints[name] for name in ("text_len", "eps") if hints.get(name)})
    sizes["num_heads"] = hints.get("num_heads") or _heads(sizes["hidden_size"])
    layers = infer_layers(shapes, hints)[1]
    try:
        return VaceConfig(trunk=WanConfig(**sizes), vace_layers=layers, vace_in_dim=vace_in_dim)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise WeightsError(
            f"sizes do not fit together: {problem}", fix="correct the config.json next to the weights"
        ) from None


def infer_layers(shapes: Mapping[str, Shape], hints: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """Infer num_layers and vace_layers, which pipeline stages need. Works without num_heads.

    Raises WeightsError as `infer_config` does.
    """
    sizes = sizes_of_shapes(shapes)
    blocks, num_layers = sizes["branch_blocks"], sizes["num_layers"]
    check_hints(shapes, hints)
    saved = hints.get("vace_layers") or ()
    return num_layers, tuple(saved) if saved and blocks else _spread(blocks, num_layers)


def preset_name(config: VaceConfig) -> str | None:
    """Return the name of the published model with these sizes, if any. The experts of A14B count as 14B."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


def _heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise WeightsError(
            "the number of heads is unknown: there is no usable config.json next to the weights, and width "
            f"{width} is not a multiple of {HEAD_WIDTH}",
            fix="add a config.json with num_heads next to them",
        )
    return width // HEAD_WIDTH


def _spread(blocks: int, layers: int) -> tuple[int, ...]:
    """Return every n-th layer: 0, 2, … for 15 of 30, and 0, 5, … for 8 of 40."""
    if not blocks:
        return ()
    if layers % blocks:
        raise WeightsError(
            f"vace_layers are unknown: {blocks} branch blocks on {layers} layers and no usable config.json",
            fix="add a config.json with vace_layers next to the weights",
        )
    return tuple(range(0, layers, layers // blocks))
