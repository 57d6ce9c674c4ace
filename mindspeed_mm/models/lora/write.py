"""Writes LoRAs with the keys of peft, ComfyUI or diffusers.

Alpha is always written, and nothing is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.tensors import TensorFile
from mindspeed_mm.models.dialects import truncate_list
from mindspeed_mm.models.lora.adapter import Adapter, Pair
from mindspeed_mm.models.wan.state_dict import KEY_MAPS

_PEFT = "base_model.model."
_COMFYUI = "diffusion_model."
DIFFUSERS = "transformer."
Tensors = dict[str, TensorFile]


def peft_tensors(adapter: Adapter) -> Tensors:
    """Return the tensors of adapter_model.safetensors. Raises WeightsError for weights peft cannot store."""
    bare = [name for name in adapter.whole if not name.endswith((".weight", ".bias"))]
    _refuse(adapter, [*adapter.diffs, *bare], "peft folder")
    found = {f"{_PEFT}{name}": tensor for name, tensor in adapter.whole.items()}
    return found | _matrices(adapter, lambda module: _PEFT + module, ".lora_A.weight", ".lora_B.weight")


def diffusers_tensors(adapter: Adapter) -> Tensors:
    """Return the tensors for diffusers' `load_lora_adapter`. All scales must be 1; see `fold_scales`."""
    _refuse(adapter, [*adapter.diffs, *adapter.whole], "diffusers file")
    return _matrices(
        adapter, lambda module: DIFFUSERS + diffusers_name(module), ".lora_A.weight", ".lora_B.weight"
    )


def comfyui_tensors(adapter: Adapter) -> Tensors:
    """Return the tensors of a file for ComfyUI's LoRA loaders.

    Raises WeightsError for whole weights; see `subtract_base`.
    """
    _refuse(adapter, list(adapter.whole), "ComfyUI file")
    found = _matrices(adapter, lambda module: _COMFYUI + module, ".lora_down.weight", ".lora_up.weight")
    for weight, pair in adapter.pairs.items():
        alpha = torch.tensor(pair.alpha, dtype=torch.float32)
        found[f"{_COMFYUI}{_module(weight)}.alpha"] = TensorFile(alpha.shape, alpha.dtype, alpha.clone)
    for name, tensor in adapter.diffs.items():
        module, _, last = name.rpartition(".")
        key = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(last, f"{name}.diff")
        found[f"{_COMFYUI}{key}"] = tensor
    return found


def peft_config(adapter: Adapter, base: str | None = None) -> dict[str, Any]:
    """Return the content of adapter_config.json. Patterns list layers with another rank or alpha."""
    ranks = {_module(name): pair.rank for name, pair in adapter.pairs.items()}
    alphas = {_module(name): _plain(pair.alpha) for name, pair in adapter.pairs.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted({_module(name) for name in adapter.whole}) or None,
    }


def diffusers_metadata(adapter: Adapter) -> dict[str, Any]:
    """Return diffusers' `lora_adapter_metadata`: peft's settings with diffusers' module names."""
    config = peft_config(adapter)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {diffusers_name(module): value for module, value in config[key].items()}
    config["target_modules"] = [diffusers_name(module) for module in config["target_modules"]]
    return {f"{DIFFUSERS}{key}": value for key, value in config.items()}


def diffusers_name(module: str) -> str:
    """Convert a layer's official name to diffusers' name."""
    return KEY_MAPS["diffusers"].to_theirs(f"{module}.weight").removesuffix(".weight")


def fold_scales(adapter: Adapter) -> Adapter:
    """Return the LoRA with scales folded into `up`, so that readers that ignore alpha get the same result."""
    pairs = {
        name: pair
        if pair.scale == 1
        else replace(pair, up=_mapped(pair.up, partial(_times, pair.scale)), scale=1.0)
        for name, pair in adapter.pairs.items()
    }
    return replace(adapter, pairs=pairs)


def subtract_base(adapter: Adapter, base: Mapping[str, TensorFile]) -> Adapter:
    """Return the LoRA with fp32 differences from `base` instead of whole weights.

    Raises WeightsError if `base` lacks a weight.
    """
    if missing := [name for name in adapter.whole if name not in base]:
        raise WeightsError(f"its base has no {truncate_list(missing)}", where=adapter.path)
    diffs = {
        name: TensorFile(tensor.shape, torch.float32, partial(_difference, tensor, base[name]))
        for name, tensor in adapter.whole.items()
    }
    return replace(adapter, diffs={**adapter.diffs, **diffs}, whole={})


def cast_adapter(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the same LoRA with all of its weights in `dtype`."""

    def cast(tensor: TensorFile) -> TensorFile:
        return TensorFile(tensor.shape, dtype, partial(_read_as, tensor, dtype))

    pairs = {name: Pair(cast(pair.down), cast(pair.up), pair.scale) for name, pair in adapter.pairs.items()}
    diffs = {name: cast(tensor) for name, tensor in adapter.diffs.items()}
    return replace(
        adapter,
        pairs=pairs,
        diffs=diffs,
        whole={name: cast(tensor) for name, tensor in adapter.whole.items()},
    )


def layer_shapes(adapter: Adapter) -> dict[str, torch.Size]:
    """Infer the shapes of the changed weights from the LoRA's tensors."""
    found = {
        name: torch.Size((pair.up.shape[0], *pair.down.shape[1:])) for name, pair in adapter.pairs.items()
    }
    return found | {name: tensor.shape for name, tensor in (*adapter.diffs.items(), *adapter.whole.items())}


def _matrices(adapter: Adapter, spell: Callable[[str], str], down: str, up: str) -> Tensors:
    found: Tensors = {}
    for weight, pair in adapter.pairs.items():
        stem = spell(_module(weight))
        found[stem + down], found[stem + up] = pair.down, _shaped_up(pair)
    return found


def _shaped_up(pair: Pair) -> TensorFile:
    """Return `up`, reshaped for a convolution to a kernel of size 1."""
    shape = torch.Size((*pair.up.shape[:2], *(1 for _ in pair.down.shape[2:])))
    if shape == pair.up.shape:
        return pair.up
    return TensorFile(shape, pair.up.dtype, partial(_view, pair.up, shape))


def _refuse(adapter: Adapter, names: list[str], target: str) -> None:
    if names:
        raise WeightsError(
            "changes weights by more than a low rank, which "
            f"a {target} cannot hold: {truncate_list(sorted(names))}",
            where=adapter.path,
            fix="merge it into its base with mm-convert VACEConverter merge_lora",
        )


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]


def _usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else 8


def _plain(alpha: float) -> float | int:
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-9 * abs(alpha) else alpha


def _mapped(tensor: TensorFile, change: Callable[[Tensor], Tensor]) -> TensorFile:
    return replace(tensor, read=lambda: change(tensor.read()))


def _times(scale: float, values: Tensor) -> Tensor:
    return (values.float() * scale).to(values.dtype)


def _difference(whole: TensorFile, base: TensorFile) -> Tensor:
    return whole.read().float() - base.read().float()


def _read_as(tensor: TensorFile, dtype: torch.dtype) -> Tensor:
    return tensor.read().to(dtype)


def _view(tensor: TensorFile, shape: torch.Size) -> Tensor:
    return tensor.read().reshape(shape)
