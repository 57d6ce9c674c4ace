"""The weight shapes of a model with given sizes, and sizes inferred from weight shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig

Shape = tuple[int, ...]


def layout(config: VaceConfig) -> dict[str, Shape]:
    """Map official names to shapes, for every weight of a model with these sizes."""
    trunk, width = config.trunk, config.trunk.hidden_size
    shapes: dict[str, Shape] = {}
    _linear(shapes, "patch_embedding", (width, trunk.in_dim, *trunk.patch_size))
    _linear(shapes, "text_embedding.0", (width, trunk.text_dim))
    _linear(shapes, "text_embedding.2", (width, width))
    _linear(shapes, "time_embedding.0", (width, trunk.freq_dim))
    _linear(shapes, "time_embedding.2", (width, width))
    _linear(shapes, "time_projection.1", (6 * width, width))
    for index in range(trunk.num_layers):
        _block(shapes, f"blocks.{index}", trunk)
    patch = trunk.patch_size[0] * trunk.patch_size[1] * trunk.patch_size[2]
    shapes["head.modulation"] = (1, 2, width)
    _linear(shapes, "head.head", (trunk.out_dim * patch, width))
    for index in range(len(config.vace_layers)):
        _block(shapes, f"vace_blocks.{index}", trunk)
        if index == 0:
            _linear(shapes, "vace_blocks.0.before_proj", (width, width))
        _linear(shapes, f"vace_blocks.{index}.after_proj", (width, width))
    if config.vace_layers:
        _linear(shapes, "vace_patch_embedding", (width, config.vace_in_dim, *trunk.patch_size))
    return shapes


def modules(config: VaceConfig) -> list[str]:
    """Return the names of all modules of a model with these sizes, in its order except for activations."""
    found: dict[str, None] = {}
    for weight in layout(config):
        parts = weight.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            stem, last = parts[: end - 1], parts[end - 1]
            # numbers that a sequence skips in the weight names are its activations
            members = [str(index) for index in range(int(last) + 1)] if last.isdigit() else [last]
            found.update(dict.fromkeys(".".join([*stem, member]) for member in members))
    return list(found)


def linears(config: VaceConfig) -> dict[str, Shape]:
    """Map names to (out, in), for every linear layer of a model with these sizes."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in layout(config).items()
        if name.endswith(".weight") and len(shape) == 2
    }


def sizes_of_shapes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Infer sizes from the shapes, as fields of WanConfig and VaceConfig plus `branch_blocks`.

    Raises WeightsError if a required weight is missing or has the wrong number of dimensions.
    """
    width, in_dim, *patch = _shape(shapes, "patch_embedding.weight", 5)
    branch_blocks = _count(shapes, "vace_blocks")
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "in_dim": in_dim,
        "patch_size": tuple(patch),
        "ffn_dim": _shape(shapes, "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": _count(shapes, "blocks"),
        "text_dim": _shape(shapes, "text_embedding.0.weight", 2)[1],
        "freq_dim": _shape(shapes, "time_embedding.0.weight", 2)[1],
        "out_dim": _shape(shapes, "head.head.weight", 2)[0] // max(patch[0] * patch[1] * patch[2], 1),
        "branch_blocks": branch_blocks,
    }
    if branch_blocks:
        sizes["vace_in_dim"] = _shape(shapes, "vace_patch_embedding.weight", 5)[1]
    return sizes


def layout_of_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the complete layout of the model with these shapes. Works without num_heads and vace_layers."""
    sizes = sizes_of_shapes(shapes)
    blocks = sizes.pop("branch_blocks")
    vace_in_dim = sizes.pop("vace_in_dim", WAN.context_channels)
    if blocks > sizes["num_layers"]:
        raise WeightsError(
            f"{blocks} branch blocks on {sizes['num_layers']} trunk blocks: trunk blocks are missing",
            fix="list all files of the model",
        )
    trunk = WanConfig.model_construct(**sizes)
    return layout(
        VaceConfig.model_construct(trunk=trunk, vace_layers=tuple(range(blocks)), vace_in_dim=vace_in_dim)
    )


def _linear(shapes: dict[str, Shape], name: str, shape: Shape) -> None:
    shapes[f"{name}.weight"] = shape
    shapes[f"{name}.bias"] = shape[:1]


def _block(shapes: dict[str, Shape], name: str, trunk: WanConfig) -> None:
    width = trunk.hidden_size
    shapes[f"{name}.modulation"] = (1, 6, width)
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            _linear(shapes, f"{name}.{attention}.{part}", (width, width))
        for part in "qk":
            shapes[f"{name}.{attention}.norm_{part}.weight"] = (width,)
    shapes[f"{name}.norm3.weight"] = shapes[f"{name}.norm3.bias"] = (width,)
    _linear(shapes, f"{name}.ffn.0", (trunk.ffn_dim, width))
    _linear(shapes, f"{name}.ffn.2", (width, trunk.ffn_dim))


def _shape(shapes: Mapping[str, Shape], name: str, dims: int) -> Shape:
    if name not in shapes:
        raise WeightsError(f"{name} is missing", expected="a complete Wan or VACE transformer")
    if len(shapes[name]) != dims:
        raise WeightsError(f"{name} has shape {list(shapes[name])}", expected=f"{dims} dimensions")
    return tuple(shapes[name])


def _count(shapes: Mapping[str, Shape], stem: str) -> int:
    indices = {int(name.split(".")[1]) for name in shapes if name.startswith(stem + ".")}
    count = max(indices) + 1 if indices else 0
    if count > len(shapes):
        raise WeightsError(
            f"{stem} are numbered up to {count - 1}, but there are only {len(shapes)} weights",
            fix="download the weights again",
        )
    return count
