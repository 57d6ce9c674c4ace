"""Sizes ⇄ weights.

The names and shapes that a VaceConfig implies, the sizes that shapes imply, and config.json both ways. No
torch.

The shapes decide; config.json must confirm them, and adds what no shape tells: heads, text_len, eps,
vace_layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig, WanConfig

Shape = tuple[int, ...]
HEAD_WIDTH = 128  # of every published Wan; used when no config.json names the heads
_NAMES = {  # our field → (original config.json, diffusers config.json)
    "hidden_size": ("dim", None),
    "ffn_dim": ("ffn_dim", "ffn_dim"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_layers": ("num_layers", "num_layers"),
    "in_dim": ("in_dim", "in_channels"),
    "out_dim": ("out_dim", "out_channels"),
    "text_dim": ("text_dim", "text_dim"),
    "text_len": ("text_len", "text_len"),
    "freq_dim": ("freq_dim", "freq_dim"),
    "patch_size": ("patch_size", "patch_size"),
    "eps": ("eps", "eps"),
    "vace_layers": ("vace_layers", "vace_layers"),
    "vace_in_dim": ("vace_in_dim", "vace_in_channels"),
}
_FIXED: Mapping[str, tuple[object, ...]] = {  # what Wan and VACE have one form of, as each dialect writes it
    "qk_norm": (True, "rms_norm_across_heads"),
    "cross_attn_norm": (True,),
}
_SHIFTED = {  # key that VaceWanModel.save_pretrained writes → the key whose value it writes there
    "text_len": "patch_size",
    "in_dim": "text_len",
    "dim": "in_dim",
    "ffn_dim": "dim",
    "freq_dim": "ffn_dim",
    "out_dim": "freq_dim",
    "num_heads": "text_dim",
    "num_layers": "out_dim",
    "eps": "num_heads",
}


def layout(config: VaceConfig) -> dict[str, Shape]:
    """Every weight of a model of these sizes: official name → shape."""
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
    """Every module of a model of these sizes by its name, in the model's order but for activations."""
    found: dict[str, None] = {}
    for weight in layout(config):
        parts = weight.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            stem, last = parts[: end - 1], parts[end - 1]
            # what stands between the members of a sequence that have weights are its activations
            members = [str(index) for index in range(int(last) + 1)] if last.isdigit() else [last]
            found.update(dict.fromkeys(".".join([*stem, member]) for member in members))
    return list(found)


def linears(config: VaceConfig) -> dict[str, Shape]:
    """Every linear layer of a model of these sizes: name → (out, in)."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in layout(config).items()
        if name.endswith(".weight") and len(shape) == 2
    }


def sizes_of_shapes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes tell, as fields of WanConfig and VaceConfig plus `branch_blocks`.

    Raises WeightsError when a weight that it reads from is missing or has the wrong number of dimensions.
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
    """The complete layout of the model that these shapes belong to; needs no heads and no vace_layers."""
    sizes = sizes_of_shapes(shapes)
    blocks = sizes.pop("branch_blocks")
    vace_in_dim = sizes.pop("vace_in_dim", 96)
    if blocks > sizes["num_layers"]:
        raise WeightsError(
            f"{blocks} branch blocks on {sizes['num_layers']} trunk blocks: trunk blocks are missing"
        )
    trunk = WanConfig.model_construct(**sizes)
    return layout(
        VaceConfig.model_construct(trunk=trunk, vace_layers=tuple(range(blocks)), vace_in_dim=vace_in_dim)
    )


def infer_config(shapes: Mapping[str, Shape], hints: Mapping[str, Any]) -> VaceConfig:
    """Sizes from the shapes, and from `hints` (`read_hints`) what shapes cannot tell.

    Raises WeightsError if they are unknown, or contradict each other.
    """
    check_hints(shapes, hints)
    sizes = sizes_of_shapes(shapes)
    del sizes["branch_blocks"]
    vace_in_dim = sizes.pop("vace_in_dim", 96)
    sizes.update({name: hints[name] for name in ("text_len", "eps") if hints.get(name)})
    sizes["num_heads"] = hints.get("num_heads") or _heads(sizes["hidden_size"])
    layers = infer_layers(shapes, hints)[1]
    try:
        return VaceConfig(trunk=WanConfig(**sizes), vace_layers=layers, vace_in_dim=vace_in_dim)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise WeightsError(
            f"sizes do not fit together: {problem}", fix="correct the config.json beside the weights"
        ) from None


def infer_layers(shapes: Mapping[str, Shape], hints: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """num_layers and vace_layers, which stages need and for which the heads do not matter.

    Raises WeightsError like infer_config.
    """
    sizes = sizes_of_shapes(shapes)
    blocks, num_layers = sizes["branch_blocks"], sizes["num_layers"]
    check_hints(shapes, hints)
    saved = hints.get("vace_layers") or ()
    return num_layers, tuple(saved) if saved and blocks else _spread(blocks, num_layers)


def check_hints(shapes: Mapping[str, Shape], hints: Mapping[str, Any], where: str | Path = "") -> None:
    """Raises WeightsError if a config.json (`hints`, from `where`) does not fit tensors of these shapes."""
    if found := _contradictions(shapes, hints):
        raise WeightsError(
            f"contradicts the tensors: {'; '.join(found)}",
            where=where,
            fix="correct it, or remove it if it is of another model",
        )


def _contradictions(shapes: Mapping[str, Shape], hints: Mapping[str, Any]) -> list[str]:
    """Key, value in config.json and what the tensors show, for each that differs."""
    sizes = sizes_of_shapes(shapes)
    blocks = sizes.pop("branch_blocks")
    found = []
    for name, keys in _NAMES.items():
        value = hints.get(name)
        if value is None:
            continue
        key = "/".join(dict.fromkeys([name, *filter(None, keys)]))
        if name in sizes:
            if not _of_its_kind(name, value) or _plain(value) != _plain(sizes[name]):
                found.append(f"{key} is {_brief(value)}, the tensors show {_plain(sizes[name])}")
        elif not _of_its_kind(name, value):
            found.append(f"{key} is {_brief(value)}, expected {_kind_in_words(name, sizes, blocks)}")
        elif name == "num_heads" and (sizes["hidden_size"] % value or sizes["hidden_size"] // value % 2):
            found.append(f"{key} is {value}, expected {_kind_in_words(name, sizes, blocks)}")
        elif name == "vace_layers" and blocks and value and len(value) != blocks:  # [] is a trunk's config
            found.append(f"{key} names {len(value)} blocks, the tensors show {blocks}")
    found += [
        f"{name} is {_brief(hints[name])}, the tensors show a norm"
        for name, forms in _FIXED.items()
        if hints.get(name) is not None and hints[name] not in forms
    ]
    return found


def _kind_in_words(name: str, sizes: Mapping[str, Any], blocks: int) -> str:
    if name == "vace_layers":
        return f"a list of {blocks} layers, as the tensors show" if blocks else "a list of layers"
    if name == "num_heads":
        return f"a number of heads of even width, of {sizes['hidden_size']} channels in the tensors"
    return "a number above 0 and below 1" if name == "eps" else "a whole number above 0"


def _brief(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"


def setting_conflicts(settings: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """Where `settings` (fields of WanConfig and VaceConfig) and a config.json differ.

    `num_heads is 12 … and 6 …`.
    """
    return [
        f"{name} is {_plain(settings[name])}, not {_plain(hints[name])}"
        for name in _NAMES
        if settings.get(name) is not None
        and hints.get(name) is not None
        and _of_its_kind(name, hints[name])
        and _plain(settings[name]) != _plain(hints[name])
    ]


def read_hints(values: object) -> dict[str, Any]:
    """A config.json (original, diffusers, or a VaceConfig of ours) as our field names.

    {} when it is none of them.

    The official VaceWanModel.save_pretrained writes values one key too early (dim 16, eps 40): they are put
    right.
    """
    if not isinstance(values, Mapping) or "architectures" in values:  # which transformers writes
        return {}
    if isinstance(values.get("trunk"), Mapping):
        return {
            **values["trunk"],
            **{key: values[key] for key in ("vace_layers", "vace_in_dim") if key in values},
        }
    if isinstance(values.get("text_len"), list) and "vace_layers" in values:
        known = ("vace_layers", "vace_in_dim")
        shifted = {right: values[key] for key, right in _SHIFTED.items() if key in values}
        values = {**shifted, **{key: values[key] for key in known if key in values}}
    column = 1 if "num_attention_heads" in values else 0
    spelled = {name: keys[column] for name, keys in _NAMES.items()}
    hints = {name: values[key] for name, key in spelled.items() if key is not None and key in values}
    hints.update({name: values[name] for name in _FIXED if name in values})
    width = values.get("attention_head_dim")
    if column == 1 and isinstance(width, int) and isinstance(hints["num_heads"], int):
        hints["hidden_size"] = width * hints["num_heads"]
    return hints


def official_json(config: VaceConfig) -> dict[str, Any]:
    """The config.json of an original Wan folder."""
    trunk = config.trunk
    values: dict[str, Any] = {
        "_class_name": "VaceWanModel" if config.vace_layers else "WanModel",
        "model_type": "vace" if config.vace_layers else "t2v",
        "dim": trunk.hidden_size,
        "eps": trunk.eps,
        "ffn_dim": trunk.ffn_dim,
        "freq_dim": trunk.freq_dim,
        "in_dim": trunk.in_dim,
        "num_heads": trunk.num_heads,
        "num_layers": trunk.num_layers,
        "out_dim": trunk.out_dim,
        "text_dim": trunk.text_dim,
        "text_len": trunk.text_len,
        "patch_size": list(trunk.patch_size),
    }
    if config.vace_layers:
        values |= {"vace_layers": list(config.vace_layers), "vace_in_dim": config.vace_in_dim}
    return values


def diffusers_json(config: VaceConfig) -> dict[str, Any]:
    """The config.json of a diffusers `transformer/` folder."""
    trunk = config.trunk
    values: dict[str, Any] = {
        "_class_name": "WanVACETransformer3DModel" if config.vace_layers else "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": trunk.head_dim,
        "cross_attn_norm": True,
        "eps": trunk.eps,
        "ffn_dim": trunk.ffn_dim,
        "freq_dim": trunk.freq_dim,
        "image_dim": None,
        "in_channels": trunk.in_dim,
        "num_attention_heads": trunk.num_heads,
        "num_layers": trunk.num_layers,
        "out_channels": trunk.out_dim,
        "patch_size": list(trunk.patch_size),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": trunk.text_dim,
    }
    if config.vace_layers:
        values |= {"vace_in_channels": config.vace_in_dim, "vace_layers": list(config.vace_layers)}
    if (
        trunk.text_len != WanConfig.model_fields["text_len"].default
    ):  # no field of diffusers; only tiny models need it
        values["text_len"] = trunk.text_len
    return values


def preset_name(config: VaceConfig) -> str | None:
    """The published model of these sizes; 14B and the experts of A14B share theirs."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


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
        raise WeightsError(f"{stem} are numbered up to {count - 1}, but there are only {len(shapes)} weights")
    return count


def _heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise WeightsError(
            "the number of heads is unknown: there is no usable config.json beside the weights, and width "
            f"{width} is not a multiple of {HEAD_WIDTH}",
            fix="put a config.json with num_heads beside them",
        )
    return width // HEAD_WIDTH


def _spread(blocks: int, layers: int) -> tuple[int, ...]:
    """Every n-th layer: 15 of 30 → 0, 2, …; 8 of 40 → 0, 5, …."""
    if not blocks:
        return ()
    if layers % blocks:
        raise WeightsError(
            f"vace_layers are unknown: {blocks} branch blocks on {layers} layers and no usable config.json",
            fix="put a config.json with vace_layers beside the weights",
        )
    return tuple(range(0, layers, layers // blocks))


def _of_its_kind(name: str, value: Any) -> bool:
    """Whether a config.json may say `value` for a size; any file of that name may be beside the weights."""
    if value is None:
        return True
    if name in ("patch_size", "vace_layers"):
        if not isinstance(value, (list, tuple)) or (name == "patch_size" and len(value) != 3):
            return False
        return all(type(number) is int and 0 <= number < 2**31 for number in value)
    if name == "eps":
        return type(value) is float and 0 < value < 1
    return type(value) is int and 0 < value < 2**31


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
