"""Detect the dialect of a checkpoint, and translate its weight names to the official names.

LoRA files are recognized and rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.foreign import foreign_model
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.wan.state_dict import KEY_MAPS

W = TypeVar("W")
PREFIXES = (
    *("model.", "diffusion_model.", "module.", "predictor.", "transformer.", "pipe.", "dit.", "vace."),
    *("net.", "base_model."),
)
MAX_LISTED = 10  # names in a message
_LORA = re.compile(r"(^|[._])lora_(A|B|up|down|unet|te)|^lora_")
_WRAPPER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HUGE_INDEX = re.compile(r"\d{6,}")  # no model has that many blocks


@dataclass(frozen=True)
class Naming:
    """The dialect of a checkpoint, and its names."""

    dialect: str
    ours: Mapping[str, str]  # official name → name in the file


def detect_dialect(
    names: Iterable[str], where: str | Path, key_maps: Mapping[str, KeyMap] = KEY_MAPS
) -> Naming:
    """Detect the dialect of weight names, and translate them to official names.

    Raises WeightsError for LoRA files, unknown names and duplicates.
    """
    raw = list(names)
    if not raw:
        raise WeightsError("contains no weights", where=where)
    _refuse_lora(raw, where)
    bare = {name: bare_name(name) for name in raw}
    dialect = _nearest(list(bare.values()), key_maps)
    key_map = key_maps[dialect]
    foreign = [name for name, short in bare.items() if not key_map.knows(short) or _HUGE_INDEX.search(short)]
    if foreign:
        known = len(raw) - len(foreign)
        what = f"got {dialect} names ({known} of {len(raw)})" if known else "no known dialect of this model"
        if model := foreign_model(bare[name] for name in foreign):
            raise WeightsError(
                f"got {model}: {truncate_list(foreign)}",
                where=where,
                expected="a Wan or VACE transformer",
                fix="use the file of the transformer",
            )
        raise WeightsError(
            f"{what}; unknown names: {truncate_list(foreign)}",
            where=where,
            expected=f"one of {', '.join(key_maps)}",
        )
    ours: dict[str, str] = {}
    for name, short in bare.items():
        official = key_map.to_ours(short)
        if official in ours:
            raise WeightsError(
                f"{name!r} and {ours[official]!r} are the same weight {official!r}",
                where=where,
                fix="keep one",
            )
        ours[official] = name
    return Naming(dialect, ours)


def bare_name(name: str) -> str:
    """Strip prefixes of repackaged files, wrappers and torch.compile from a name.

    Examples are `model.diffusion_model.` and `_orig_mod.`.
    """
    name = _WRAPPER.sub("", name)
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name


def strip_prefix(state: Mapping[str, W], landmarks: Iterable[str], where: str | Path) -> dict[str, W]:
    """Strip the prefixes of wrappers, and a prefix that all names share.

    Args:
        state: weights of one model, such as `vae.encoder.conv1.weight`.
        landmarks: names of which every such model has at least one, such as `encoder.conv1.weight`. They
            determine the prefix.
        where: the file, for error messages.

    Raises:
        WeightsError: two names refer to the same weight.
    """
    bare = {_WRAPPER.sub("", name): weight for name, weight in state.items()}
    if len(bare) != len(state):
        raise WeightsError(
            "contains some weights both with and without a wrapper's prefix", where=str(where), fix="keep one"
        )
    ends = [(name, mark) for mark in landmarks for name in bare if name == mark or name.endswith(f".{mark}")]
    prefix = ends[0][0].removesuffix(ends[0][1]) if ends else ""
    if all(name.startswith(prefix) for name in bare):
        return {name.removeprefix(prefix): weight for name, weight in bare.items()}
    return bare


def truncate_list(names: Iterable[str]) -> str:
    """Join names for a message: at most ten, followed by their total number."""
    found = [name if name.isprintable() else repr(name) for name in names]
    rest = f", … ({len(found)} in all)" if len(found) > MAX_LISTED else ""
    return ", ".join(found[:MAX_LISTED]) + rest


def _nearest(names: list[str], key_maps: Mapping[str, KeyMap]) -> str:
    scores = {dialect: sum(key_map.knows(name) for name in names) for dialect, key_map in key_maps.items()}
    return max(scores, key=lambda dialect: scores[dialect])


def _refuse_lora(names: list[str], where: str | Path) -> None:
    lora = [name for name in names if _LORA.search(name)]
    if lora:
        raise WeightsError(
            f"got a LoRA ({len(lora)} adapter weights, such as {lora[0]})",
            where=where,
            expected="the weights of a whole model",
            fix="merge it into its base with mm-convert VACEConverter merge_lora, and use the merged weights",
        )
