"""Reads LoRAs in any dialect. Every key is applied or rejected by name; tensors are read lazily."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import json_type, parse_json, read_json_object, regular_file
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.containers.safetensors import read_safetensors
from mindspeed_mm.models.containers.tensors import FLOATS, TensorFile
from mindspeed_mm.models.containers.torch_file import read_torch
from mindspeed_mm.models.dialects import truncate_list
from mindspeed_mm.models.lora.adapter import Adapter, Pair
from mindspeed_mm.models.lora.names import Key, NameTable, family_of, is_lora_key, refuse_unsupported
from mindspeed_mm.models.wan.config import PRESETS
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.safetensors_header import read_safetensors_header

Expert = Literal["high", "low"]
logger = get_logger(__name__)
CONFIG = "adapter_config.json"
_PEFT = "base_model.model."
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that also change the base


@dataclass(frozen=True)
class _Raw:
    """A file whose keys are not parsed yet."""

    path: Path
    tensors: Mapping[str, TensorFile]
    config: Mapping[str, Any] = field(default_factory=dict)  # peft's
    settings: Mapping[str, Any] = field(default_factory=dict)  # diffusers', e.g. transformer.lora_alpha

    def alpha(self, key: str, key_of: Key) -> tuple[float | None, bool]:
        """Return (alpha, whether to divide it by √rank) from the settings stored with the tensors."""
        module = key_of.weight.rpartition(".")[0]
        if self.config:
            return _pattern_alpha(self.config, module, _theirs(key, key_of)), bool(
                self.config.get("use_rslora")
            )
        for prefix in ("transformer_2." if key_of.is_second else "transformer.", ""):
            mine = {k[len(prefix) :]: v for k, v in self.settings.items() if k.startswith(prefix)}
            if "lora_alpha" in mine:
                return _pattern_alpha(mine, module, _theirs(key, key_of)), bool(mine.get("use_rslora"))
        return None, False


def open_lora(
    path: str | Path, shapes: Mapping[str, Sequence[int]], *, expert: Expert | None = None
) -> Adapter:
    """Open the LoRA in a file or folder, for a model with the weight names and shapes in `shapes`.

    `expert` selects one expert from a file that holds both experts of A14B; a file that marks neither fits
    both. Raises WeightsError if a key is unknown, half of a pair is missing, shapes or ranks do not fit, or
    an alpha is not positive.
    """
    raw = _read(Path(path))
    refuse_unsupported(raw.tensors, raw.path)
    table = NameTable(shapes)
    keys: dict[str, Key] = {}
    foreign: list[str] = []
    for key in raw.tensors:
        found = table.find(key, with_whole=bool(raw.config))
        if found is None:
            foreign.append(key)
        else:
            keys[key] = found
    if foreign:
        _refuse_foreign(raw, foreign, shapes)
    second = {key: found for key, found in keys.items() if found.is_second}
    if second and len(second) < len(keys) and expert is None:
        raise WeightsError(
            "contains LoRAs of both experts", where=raw.path, fix="choose the expert: high or low"
        )
    if second and expert is not None:
        keys = second if expert == "low" else {k: v for k, v in keys.items() if not v.is_second}
    return _adapter(raw, keys, shapes)


def open_published_lora(path: str | Path, *, expert: Expert | None = None) -> Adapter:
    """Open a LoRA for the first published model that it fits. Raises WeightsError if it fits none."""
    errors: list[WeightsError] = []
    for config in PRESETS.values():
        try:
            return open_lora(path, layout(config), expert=expert)
        except WeightsError as error:
            errors.append(error)
    first = errors[0]
    if all(str(error) == str(first) for error in errors):
        raise first
    raise WeightsError(
        f"fits none of the published models: {first.problem}",
        where=first.where,
        fix="set the weights of its base with --cfg.base_path (mm-convert)",
    )


def _adapter(raw: _Raw, keys: Mapping[str, Key], shapes: Mapping[str, Sequence[int]]) -> Adapter:
    found: dict[str, dict[str, str]] = {}  # weight → kind → key
    for key, what in keys.items():
        kinds = found.setdefault(what.weight, {})
        kind = what.kind.partition("_")[0]  # the weight's name already distinguishes diff, diff_b and diff_m
        if kind in kinds:
            raise WeightsError(f"{kinds[kind]} and {key} change {what.weight} twice", where=raw.path)
        kinds[kind] = key
    odd = [f"{key} {t.dtype}" for key, t in raw.tensors.items() if key in keys and t.dtype not in FLOATS]
    odd = [text for text in odd if ".alpha " not in text]
    if odd:
        problem = f"has weights that are not floating-point numbers: {truncate_list(odd)}"
        raise WeightsError(problem, where=raw.path)
    pairs: dict[str, Pair] = {}
    problems: list[str] = []
    for weight, kinds in found.items():
        if "down" in kinds and "up" in kinds:
            pairs[weight] = _pair(raw, weight, kinds, keys)
            problems += _misfit(weight, pairs[weight], shapes[weight])
        elif "down" in kinds or "up" in kinds:
            there, other = ("down", "up") if "down" in kinds else ("up", "down")
            raise WeightsError(
                f"{kinds[there]} has no matching {_NAMES_OF[other]}",
                where=raw.path,
                fix="copy the file again",
            )
        elif "alpha" in kinds:
            raise WeightsError(f"{kinds['alpha']} has no matching matrices", where=raw.path)
        for kind in kinds.keys() & {"diff", "whole"}:
            shape = raw.tensors[kinds[kind]].shape
            if math.prod(shape) != math.prod(shapes[weight]) or (kind == "whole" and shape != shapes[weight]):
                problems.append(f"{kinds[kind]} {list(shape)} for {list(shapes[weight])}")
    if problems:
        problem = f"does not fit the model's shapes: {truncate_list(problems)}{_other_size(pairs, shapes)}"
        raise WeightsError(problem, where=raw.path)
    diffs = {weight: raw.tensors[kinds["diff"]] for weight, kinds in found.items() if "diff" in kinds}
    whole = {weight: raw.tensors[kinds["whole"]] for weight, kinds in found.items() if "whole" in kinds}
    return Adapter(raw.path.absolute(), _dialect(raw, keys), pairs, diffs, whole)


_NAMES_OF = {"up": "up matrix (lora_B, lora_up)", "down": "down matrix (lora_A, lora_down)"}


def _pair(raw: _Raw, weight: str, kinds: Mapping[str, str], keys: Mapping[str, Key]) -> Pair:
    down, up = raw.tensors[kinds["down"]], raw.tensors[kinds["up"]]
    if len(down.shape) < 2 or len(up.shape) < 2 or down.shape[0] != up.shape[1]:
        raise WeightsError(
            f"{kinds['down']} {list(down.shape)} and {kinds['up']} {list(up.shape)} have different ranks",
            where=raw.path,
        )
    rank = down.shape[0]
    if not rank:
        raise WeightsError(f"{kinds['down']} {list(down.shape)} has rank 0", where=raw.path)
    alpha, is_rslora = raw.alpha(kinds["down"], keys[kinds["down"]])
    if "alpha" in kinds:
        stored = raw.tensors[kinds["alpha"]]
        if stored.shape.numel() != 1:
            raise WeightsError(
                f"{kinds['alpha']} has shape {list(stored.shape)}", where=raw.path, expected="one number"
            )
        if stored.dtype == torch.bool or stored.dtype.is_complex:
            raise WeightsError(f"{kinds['alpha']} is {stored.dtype}", where=raw.path, expected="a number")
        alpha, is_rslora = float(stored.read().float().reshape(-1)[0]), False
    if alpha is None:
        return Pair(down, up, 1.0)
    if not (math.isfinite(alpha) and alpha > 0):
        where = kinds.get("alpha", CONFIG if raw.config else "lora_alpha")
        raise WeightsError(f"{where} is {alpha:g}", where=raw.path, expected="an alpha above 0")
    return Pair(down, up, alpha / (math.sqrt(rank) if is_rslora else rank))


def _misfit(weight: str, pair: Pair, shape: Sequence[int]) -> list[str]:
    inner, outer = math.prod(pair.down.shape[1:]), pair.up.shape[0]
    fits = outer == shape[0] and inner == math.prod(shape[1:]) and pair.up.shape.numel() == outer * pair.rank
    return [] if fits else [f"{weight} [{outer}, {inner}] for {list(shape)}"]


def _other_size(pairs: Mapping[str, Pair], shapes: Mapping[str, Sequence[int]]) -> str:
    """Describe which Wan model the LoRA's width belongs to; "" if unknown."""
    named = {1536: "Wan2.1 1.3B", 3072: "Wan2.2-TI2V-5B", 5120: "Wan 14B"}
    widths = [pair.up.shape[0] for weight, pair in pairs.items() if weight.endswith("attn.q.weight")]
    own = [shape[0] for weight, shape in shapes.items() if weight.endswith("attn.q.weight")]
    if not widths or not own or widths[0] == own[0]:
        return ""
    name = f" ({named[widths[0]]})" if widths[0] in named else ""
    return f"; it is for a model of width {widths[0]}{name}, this one has {own[0]}"


def _refuse_foreign(raw: _Raw, foreign: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> None:
    if not any(is_lora_key(key) for key in raw.tensors):
        problem = f"contains no LoRA weights: {truncate_list(raw.tensors)}"
        raise WeightsError(problem, where=raw.path, fix="use a LoRA file")
    count = f"{len(foreign)} of its {len(raw.tensors)} keys"
    text = f"{count} name no weight of this model: {truncate_list(foreign)}"
    if family := family_of(foreign):
        raise WeightsError(f"is {family}; {text}", where=raw.path, expected="a LoRA of Wan or VACE")
    blocks = [int(m[2]) for key in foreign if (m := re.search(r"(^|[._])blocks[._](\d+)[._]", key))]
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    if blocks and max(blocks) >= layers:
        text += f"; it is for a model of at least {max(blocks) + 1} blocks, this one has {layers}"
    elif any("vace_blocks" in key for key in foreign) and not any(n.startswith("vace_") for n in shapes):
        text += "; the model has no VACE branch"
    raise WeightsError(text, where=raw.path)


def _read(path: Path) -> _Raw:
    if path.is_dir():
        if (path / CONFIG).exists():
            weights = next((path / name for name in _PEFT_WEIGHTS if (path / name).exists()), None)
            if weights is None:
                raise WeightsError(
                    f"has no {' or '.join(_PEFT_WEIGHTS)}", where=path, fix="copy the folder again"
                )
            config = read_json_object(path / CONFIG, WeightsError)
            _check_config(config, path / CONFIG)
            return _Raw(path, _read_file(weights), config=config)
        found = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:4]) or "none"
            raise WeightsError(
                f"got {names}", where=path, expected="a LoRA file, a peft folder, or a folder with one file"
            )
        path = found[0]
    tensors, beside = _read_file(path), path.with_name(CONFIG)
    if path.name in _PEFT_WEIGHTS and beside.exists():
        config = read_json_object(beside, WeightsError)
        _check_config(config, beside)
        return _Raw(path, tensors, config=config)
    settings = _metadata(path) if _is_safetensors(path) else {}
    if not settings and any(key.startswith(_PEFT) for key in tensors):
        logger.warning(f"{path}: no {CONFIG} next to it, so its alpha is unknown; scale 1", extra=once())
    return _Raw(path, tensors, settings=settings)


def _is_safetensors(path: Path) -> bool:
    """Return whether the file is safetensors, judged by its suffix or its first bytes."""
    if path.suffix in (".safetensors", ".sft"):
        return True
    with open(path, "rb") as file:
        return path.suffix not in (".pt", ".pth", ".bin", ".ckpt") and file.read(9)[8:] == b"{"


def _read_file(path: Path) -> Mapping[str, TensorFile]:
    regular_file(path, WeightsError)
    if _is_safetensors(path):
        found: Mapping[str, Any] = read_safetensors([path]).tensors
    else:
        found = read_torch(path)
        found = next((found[k] for k in ("state_dict", "model") if isinstance(found.get(k), dict)), found)
    other = [key for key, value in found.items() if not isinstance(value, TensorFile)]
    if other:
        raise WeightsError(f"{other[0]} is not a tensor", where=path, expected="a flat dict of tensors")
    if not found:
        raise WeightsError("contains no weights", where=path)
    return found


def _metadata(path: Path) -> Mapping[str, Any]:
    """Return the settings that diffusers stores in the file's header."""
    header, _, _ = read_safetensors_header(path, WeightsError)
    values = header.get("__metadata__")
    text = values.get("lora_adapter_metadata") if isinstance(values, dict) else None
    if not isinstance(text, str):
        return {}
    found = parse_json(text, f"{path}: lora_adapter_metadata", WeightsError)
    if not isinstance(found, dict):
        raise WeightsError(
            f"got {json_type(found)}", where=f"{path}: lora_adapter_metadata", expected="an object"
        )
    flat = {
        f"{part}.{k}": v for part, inner in found.items() if isinstance(inner, dict) for k, v in inner.items()
    }
    for prefix in ("transformer.", "transformer_2.", ""):
        _check_config(
            {k[len(prefix) :]: v for k, v in {**found, **flat}.items() if k.startswith(prefix)}, path
        )
    return {**found, **flat}


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    """Raise WeightsError for settings that a plain LoRA does not have or that have the wrong type."""
    kind = config.get("peft_type", "LORA")
    if str(kind).upper().rpartition(".")[2] != "LORA":
        raise WeightsError(
            f"peft_type is {kind}, which is not supported", where=where, fix="use a plain LoRA"
        )
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(value := config.get(key), bool | None):
            raise WeightsError(f"{key} is {json.dumps(value)[:60]}", where=where, expected="true or false")
        if value and key != "use_rslora":
            raise WeightsError(f"{key} is set, which is not supported", where=where, fix="use a plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise WeightsError(
            f"init_lora_weights is {start}, which changes the base weights, too",
            where=where,
            fix="save it as a plain LoRA with peft (path_initial_model_for_weight_conversion)",
        )
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, dict):
        raise WeightsError(f"alpha_pattern is {json_type(patterns)}", where=where, expected="an object")
    if odd := [one for one in patterns if not re.fullmatch(r"\^?(\w|-|\\?\.)+\$?", one)]:
        raise WeightsError(
            f"alpha_pattern {odd[0]!r} is a regular expression", where=where, expected="names of modules"
        )
    numbers = [alpha, *patterns.values()]
    if any(n is not None and (isinstance(n, bool) or not isinstance(n, int | float)) for n in numbers):
        raise WeightsError(
            f"lora_alpha or alpha_pattern is {json.dumps(numbers)[:60]}", where=where, expected="numbers"
        )


def _pattern_alpha(config: Mapping[str, Any], *spellings: str) -> float:
    """Return a module's alpha, as in peft.

    It comes from the first pattern that the module's name ends in, else lora_alpha, else peft's default.
    """
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        ending = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
        if any(name == ending or name.endswith(f".{ending}") for name in spellings):
            return float(alpha)
    default = config.get("lora_alpha")
    return 8.0 if default is None else float(default)


def _theirs(key: str, found: Key) -> str:
    """Return the module's name as spelled in the file, without prefix and suffix."""
    return re.sub(r"\.lora_[AB](\.[\w-]+)?(\.weight)?$", "", key)[len(found.prefix) :]


def _dialect(raw: _Raw, keys: Mapping[str, Key]) -> str:
    prefixes = {key.prefix for key in keys.values()}
    if raw.config:
        return "peft"
    if any(prefix.startswith(("lora_", "lycoris_")) for prefix in prefixes):
        return "kohya"
    if any("diffusion_model." in prefix for prefix in prefixes):
        return "ComfyUI"
    if any(".attn1." in key or ".attn2." in key or ".ffn.net." in key for key in keys):
        return "diffusers"
    return "DiffSynth" if any(".default." in key for key in keys) else "official"
