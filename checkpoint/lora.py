"""Merges LoRAs into their base, and writes LoRAs for other programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from checkpoint.config import ExtractLoraConfig, LoraToConfig, MergeLoraConfig
from checkpoint.convert import cast, convert, log_conversion, write_module
from checkpoint.target import Target, by_alignment, hf_target, json_text, mm_target
from checkpoint.write import Written, check_same, write_and_replace
from mindspeed_mm.accelerator import DTYPES
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.files import format_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.lora.adapter import Adapter, merged
from mindspeed_mm.models.lora.read import CONFIG, open_lora
from mindspeed_mm.models.lora.write import (
    cast_adapter,
    comfyui_tensors,
    diffusers_metadata,
    diffusers_tensors,
    fold_scales,
    layer_shapes,
    peft_config,
    peft_tensors,
    subtract_base,
)
from mindspeed_mm.models.weights import open_adapter, open_weights

logger = get_logger(__name__)
PEFT_WEIGHTS = "adapter_model.safetensors"
ToLora = LoraToConfig | ExtractLoraConfig


def merge(cfg: MergeLoraConfig) -> None:
    """Write base + Σ strength · LoRA.

    Raises ConfigError, or WeightsError if a LoRA does not fit, and leaves the target unchanged.
    """
    paths = [cfg.loras] if isinstance(cfg.loras, str) else cfg.loras
    strengths = _strengths(cfg.strengths, len(paths))
    base = open_weights(cfg.source_path, base_path=cfg.base_path)
    found = [open_adapter(path, base.shapes, expert=cfg.expert) for path in paths]
    source = cast(merged(base, list(zip(found, strengths, strict=True))), cfg.dtype)
    if cfg.form == "module":
        write_module(source, cfg, "merge_lora")
        return
    form = base.dialect if cfg.form == "source" else cfg.form
    if form == "mm":
        target = mm_target(source, cfg, cfg.target_parallel_config.pp_layers)
    else:
        target = hf_target(source, cfg, form, cfg.max_shard_gb)
    pairs = zip(found, strengths, strict=True)
    loras = [
        ("LoRA", f"{adapter.description}; strength {strength:g}, all of its {adapter.count} keys are applied")
        for adapter, strength in pairs
    ]
    convert(source, target, cfg, "merge_lora", [("source", base.description), *loras])


def write_hf(cfg: LoraToConfig) -> None:
    """Write a .safetensors file for diffusers if the target has this suffix, and a peft folder otherwise."""
    (write_diffusers if Path(cfg.target_path).suffix == ".safetensors" else write_peft)(cfg)


def write_adapter(adapter: Adapter, cfg: ExtractLoraConfig) -> None:
    """Write a LoRA in `cfg.form`. On failure, raises WeightsError and leaves the target unchanged."""
    if cfg.form == "peft":
        target = _folder(cfg, adapter, cfg.base_path)
    elif cfg.form == "diffusers":
        target = _diffusers_file(cfg, adapter)
    else:
        target = _file(cfg, comfyui_tensors(adapter))
    _put(target, adapter, cfg, "extract_lora")


def write_peft(cfg: LoraToConfig) -> None:
    """Write a folder with adapter_config.json and adapter_model.safetensors.

    On failure, raises WeightsError and leaves the target unchanged.
    """
    adapter = _open(cfg)
    _put(_folder(cfg, adapter, cfg.base_path or adapter.base), adapter, cfg, "lora_to_peft")


def _folder(cfg: ToLora, adapter: Adapter, base: str | None) -> Target:
    folder = Path(cfg.target_path)
    if folder.is_file() or folder.suffix in (".safetensors", ".pt", ".pth"):
        raise WeightsError("got a file", where=folder, expected="a folder as target_path")
    return Target(
        folder,
        "",
        {},
        {PEFT_WEIGHTS: by_alignment(peft_tensors(adapter))},
        {CONFIG: json_text(peft_config(adapter, base))},
        owned=(CONFIG, PEFT_WEIGHTS),
        last=CONFIG,
    )


def write_comfyui(cfg: LoraToConfig) -> None:
    """Write one .safetensors file with lora_down, lora_up and alpha.

    On failure, raises WeightsError and leaves the target unchanged.
    """
    adapter = _open(cfg)
    if adapter.whole:
        place = cfg.base_path or adapter.base
        if place is None:
            raise WeightsError(
                "contains whole weights, which a ComfyUI file stores as differences from the base",
                where=adapter.path,
                fix="set --cfg.base_path to the base",
            )
        adapter = subtract_base(adapter, open_weights(place).tensors)
    _put(_file(cfg, comfyui_tensors(adapter)), adapter, cfg, "lora_to_comfyui")


def write_diffusers(cfg: LoraToConfig) -> None:
    """Write one .safetensors file with diffusers names. The scales are folded into the matrices.

    On failure, raises WeightsError and leaves the target unchanged.
    """
    adapter = fold_scales(_open(cfg))
    _put(_diffusers_file(cfg, adapter), adapter, cfg, "lora_to_diffusers")


def _diffusers_file(cfg: ToLora, adapter: Adapter) -> Target:
    target = _file(cfg, diffusers_tensors(adapter))
    text = format_json(diffusers_metadata(adapter))
    return replace(target, metadata={"lora_adapter_metadata": text})


def _open(cfg: LoraToConfig) -> Adapter:
    shapes = None if cfg.base_path is None else open_weights(cfg.base_path).shapes
    adapter = open_adapter(cfg.source_path, shapes, expert=cfg.expert)
    return cast_adapter(adapter, DTYPES[cfg.dtype]) if cfg.dtype in DTYPES else adapter


def _file(cfg: ToLora, tensors: Mapping[str, TensorFile]) -> Target:
    path = Path(cfg.target_path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise WeightsError(f"got {path.name}", where=path, expected="a name in .safetensors as target_path")
    return Target(path.parent, path.name, {}, {path.name: by_alignment(tensors)}, {})


def _put(target: Target, adapter: Adapter, cfg: ToLora, method: str) -> None:
    tensors = [tensor for part in target.safetensors.values() for tensor in part.values()]

    def check(path: Path, seen: Written) -> None:
        with verifying(False):
            written = open_lora(path, layer_shapes(adapter))
            _check_written(path, adapter, written, seen)

    log_conversion(method, [("source", adapter.description)], target, tensors, cfg)
    write_and_replace(target, tensors, check, cfg, method)


def _check_written(path: Path, planned: Adapter, written: Adapter, seen: Written) -> None:
    """Raise WeightsError unless the LoRA at `path` is the planned one.

    Compares the names, the scales, and the first bytes of each tensor.
    """
    if planned.names != written.names:
        raise WeightsError("was not written as planned; report this", where=path)
    for name, pair in planned.pairs.items():
        other = written.pairs[name]
        if not math.isclose(pair.scale, other.scale, rel_tol=1e-6):
            raise WeightsError(f"{name} reads back with scale {other.scale:g}; report this", where=path)
        for ours, theirs in ((pair.down, other.down), (pair.up, other.up)):
            check_same(path, name, ours, theirs, bits=False)
            seen(ours.nbytes)
    for name, tensor in (*planned.diffs.items(), *planned.whole.items()):
        check_same(path, name, tensor, {**written.diffs, **written.whole}[name], bits=False)
        seen(tensor.nbytes)


def _strengths(values: list[float] | float, count: int) -> list[float]:
    found = [values] * count if isinstance(values, int | float) else list(values)
    if count == 0:
        raise ConfigError("got an empty list", where="loras", expected="at least one LoRA")
    if len(found) != count:
        raise ConfigError(
            f"{len(found)} numbers for {count} LoRAs", where="strengths", fix="use one for each"
        )
    if odd := [value for value in found if not math.isfinite(value) or abs(value) > 1000]:
        raise ConfigError(f"got {odd[0]:g}", where="strengths", expected="numbers from -1000 to 1000")
    return found
