"""Read, check and write a transformer's config.json, in the formats of Wan, diffusers and VaceConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig
from mindspeed_mm.models.wan.shapes import Shape, sizes_of_shapes

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
_FIXED: Mapping[str, tuple[object, ...]] = {  # the same in all Wan and VACE models; values by dialect
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


def _kind_in_words(name: str, sizes: Mapping[str, Any], blocks: int) -> str:
    if name == "vace_layers":
        return f"a list of {blocks} layers, as the tensors show" if blocks else "a list of layers"
    if name == "num_heads":
        return f"a number of heads of even width, of {sizes['hidden_size']} channels in the tensors"
    return "a number above 0 and below 1" if name == "eps" else "a whole number above 0"


def _brief(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"


def read_hints(values: object) -> dict[str, Any]:
    """Convert a config.json (original, diffusers or our VaceConfig) to our field names; {} for other files.

    The official VaceWanModel.save_pretrained shifts values by one key (dim 16, eps 40); this undoes it.
    """
    if not isinstance(values, Mapping) or "architectures" in values:  # a config.json of transformers
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
    """Return the config.json of a Wan model folder in the original format."""
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
    """Return the config.json of a diffusers `transformer/` folder."""
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
    ):  # not a diffusers field; only tiny models need it
        values["text_len"] = trunk.text_len
    return values


def _of_its_kind(name: str, value: Any) -> bool:
    """Return whether `value` is valid for the setting `name`. The config.json may belong to any model."""
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


def check_hints(shapes: Mapping[str, Shape], hints: Mapping[str, Any], where: str | Path = "") -> None:
    """Raise WeightsError if a config.json (`hints`, from `where`) does not match these tensor shapes."""
    if found := _contradictions(shapes, hints):
        raise WeightsError(
            f"contradicts the tensors: {'; '.join(found)}",
            where=where,
            fix="correct it, or remove it if it belongs to another model",
        )


def _contradictions(shapes: Mapping[str, Shape], hints: Mapping[str, Any]) -> list[str]:
    """Describe each mismatch: the key, its value in config.json and the value that the tensors imply."""
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
        # vace_layers [] means a config of the trunk
        elif name == "vace_layers" and blocks and value and len(value) != blocks:
            found.append(f"{key} names {len(value)} blocks, the tensors show {blocks}")
    found += [
        f"{name} is {_brief(hints[name])}, the tensors show a norm"
        for name, forms in _FIXED.items()
        if hints.get(name) is not None and hints[name] not in forms
    ]
    return found


def setting_conflicts(settings: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """Describe the differences between `settings` (fields of WanConfig and VaceConfig) and a config.json.

    For example, `num_heads is 12, not 6`.
    """
    return [
        f"{name} is {_plain(settings[name])}, not {_plain(hints[name])}"
        for name in _NAMES
        if settings.get(name) is not None
        and hints.get(name) is not None
        and _of_its_kind(name, hints[name])
        and _plain(settings[name]) != _plain(hints[name])
    ]
