"""Which dialect a set of weight names is in, and what they are called inside.

LoRA files are recognised and refused.
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
SHOWN = 10  # names in a message; the rest is a count
_LORA = re.compile(r"(^|[._])lora_(A|B|up|down|unet|te)|^lora_")
_WRAPPER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ABSURD = re.compile(r"\d{6,}")  # no model has that many blocks


@dataclass(frozen=True)
class Naming:
    """The names of one checkpoint, understood."""

    dialect: str
    ours: Mapping[str, str]  # official name → the name in the file


def understand(names: Iterable[str], where: str | Path, key_maps: Mapping[str, KeyMap] = KEY_MAPS) -> Naming:
    """Find prefix and dialect, and translate.

    Raises WeightsError on LoRA files, foreign names and duplicates.
    """
    raw = list(names)
    if not raw:
        raise WeightsError("contains no weights", where=where)
    _refuse_lora(raw, where)
    bare = {name: bare_name(name) for name in raw}
    dialect = _nearest(list(bare.values()), key_maps)
    key_map = key_maps[dialect]
    foreign = [name for name, short in bare.items() if not key_map.knows(short) or _ABSURD.search(short)]
    if foreign:
        known = len(raw) - len(foreign)
        what = f"looks like {dialect} names ({known} of {len(raw)})" if known else "no dialect of this model"
        if model := foreign_model(bare[name] for name in foreign):
            raise WeightsError(
                f"got {model}: {listed(foreign)}",
                where=where,
                expected="a Wan or VACE transformer",
                fix="give the transformer's file",
            )
        raise WeightsError(
            f"{what}; unknown names: {listed(foreign)}", where=where, expected=f"one of {', '.join(key_maps)}"
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
    """A name without what repackaging, wrappers and torch.compile add, e.g.

    `model.diffusion_model.` or `_orig_mod.`.
    """
    name = _WRAPPER.sub("", name)
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name[len(prefix) :]
    return name


def without_prefix(state: Mapping[str, W], landmarks: Iterable[str], where: str | Path) -> dict[str, W]:
    """Weights by their bare names, as repackaged files and wrapped modules hold them.

    Args:
        state: weights of one model, perhaps all under one prefix: `vae.encoder.conv1.weight`.
        landmarks: names of which the model has at least one: `encoder.conv1.weight`.
        where: the file, for messages.

    Raises:
        WeightsError: two names are the same weight.
    """
    bare = {_WRAPPER.sub("", name): weight for name, weight in state.items()}
    if len(bare) != len(state):
        raise WeightsError(
            "some weights are there with and without a wrapper's prefix", where=str(where), fix="keep one"
        )
    ends = [(name, mark) for mark in landmarks for name in bare if name == mark or name.endswith(f".{mark}")]
    prefix = ends[0][0].removesuffix(ends[0][1]) if ends else ""
    if all(name.startswith(prefix) for name in bare):
        return {name.removeprefix(prefix): weight for name, weight in bare.items()}
    return bare


def listed(names: Iterable[str]) -> str:
    """The first ten and a count."""
    found = [name if name.isprintable() else repr(name) for name in names]
    rest = f", … ({len(found)} in all)" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + rest


def _nearest(names: list[str], key_maps: Mapping[str, KeyMap]) -> str:
    scores = {dialect: sum(key_map.knows(name) for name in names) for dialect, key_map in key_maps.items()}
    return max(scores, key=lambda dialect: scores[dialect])


def _refuse_lora(names: list[str], where: str | Path) -> None:
    lora = [name for name in names if _LORA.search(name)]
    if lora:
        raise WeightsError(
            f"is a LoRA ({len(lora)} adapter weights, e.g. {lora[0]}), not a whole model",
            where=where,
            fix=(
                "merge it into its base with mm-convert VACEConverter merge_lora, and give the merged weights"
            ),
        )
