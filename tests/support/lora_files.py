"""One tiny LoRA in every dialect that people exchange."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from tests.support.tiny import tiny_transformer

RANK, ALPHA = 4, 2.0
Matrices = Mapping[str, tuple[Tensor, Tensor]]  # official module → down, up


def lora_matrices(*parts: str, seed: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every attention and feed-forward layer of the tiny transformer's `blocks` and `vace_blocks`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in tiny_transformer().named_modules():
        is_target = name.endswith((".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2"))
        if is_target and name.split(".")[0] in (parts or ("blocks", "vace_blocks")):
            out, width = module.weight.shape
            down = torch.randn(RANK, width, generator=generator) / width**0.5
            found[name] = (down, 0.2 * torch.randn(out, RANK, generator=generator))
    return found


def deltas(matrices: Matrices, scale: float = ALPHA / RANK) -> dict[str, Tensor]:
    """Map official weight names to the values that a LoRA adds."""
    return {f"{name}.weight": scale * (up @ down) for name, (down, up) in matrices.items()}


def diffusers_name(module: str) -> str:
    return KEY_MAPS["diffusers"].to_theirs(f"{module}.weight").removesuffix(".weight")


def _plain(path: Path, matrices: Matrices, name: Callable[[str], str], down: str, up: str) -> Path:
    """Without alpha: scale 1, so the scale goes into `up`."""
    keys = {}
    for module, (a, b) in matrices.items():
        keys[f"{name(module)}{down}"] = a.clone()
        keys[f"{name(module)}{up}"] = b * (ALPHA / RANK)
    save_file(keys, path)
    return path


def _with_alpha(path: Path, matrices: Matrices, name: Callable[[str], str], down: str, up: str) -> Path:
    keys = {}
    for module, (a, b) in matrices.items():
        keys[f"{name(module)}{down}"], keys[f"{name(module)}{up}"] = a.clone(), b.clone()
        keys[f"{name(module)}.alpha"] = torch.tensor(ALPHA)
    save_file(keys, path)
    return path


def write_peft(path: Path, matrices: Matrices) -> Path:
    path.mkdir()
    keys = {}
    for module, (a, b) in matrices.items():
        keys[f"base_model.model.{module}.lora_A.weight"] = a.clone()
        keys[f"base_model.model.{module}.lora_B.weight"] = b.clone()
    save_file(keys, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(matrices)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def write_diffusers_metadata(path: Path, matrices: Matrices) -> Path:
    keys = {}
    for module, (a, b) in matrices.items():
        keys[f"transformer.{diffusers_name(module)}.lora_A.weight"] = a.clone()
        keys[f"transformer.{diffusers_name(module)}.lora_B.weight"] = b.clone()
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    save_file(keys, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    return path


A, B = ".lora_A.weight", ".lora_B.weight"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
DIALECTS: Mapping[str, Callable[[Path, Matrices], Path]] = {
    "peft": write_peft,
    "diffusers": lambda p, m: _plain(p, m, lambda n: f"transformer.{diffusers_name(n)}", A, B),
    "diffusers-metadata": write_diffusers_metadata,
    "diffsynth": lambda p, m: _plain(p, m, lambda n: n, ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffsynth-pipe": lambda p, m: _plain(
        p, m, lambda n: ("pipe.vace." if n.startswith("vace") else "pipe.dit.") + n, A, B
    ),
    "comfyui": lambda p, m: _plain(p, m, lambda n: f"diffusion_model.{n}", A, B),
    "comfyui-alpha": lambda p, m: _with_alpha(p, m, lambda n: f"diffusion_model.{n}", DOWN, UP),
    "kohya": lambda p, m: _with_alpha(p, m, lambda n: f"lora_unet_{n.replace('.', '_')}", DOWN, UP),
    "kohya-two": lambda p, m: _with_alpha(p, m, lambda n: f"lora_unet__{n.replace('.', '_')}", DOWN, UP),
    "kohya-diffusers": lambda p, m: _with_alpha(
        p, m, lambda n: f"lora_unet_{diffusers_name(n).replace('.', '_')}", DOWN, UP
    ),
    "lightx2v": lambda p, m: _with_alpha(
        p, m, lambda n: f"model.{n}", "_lora.down.weight", "_lora.up.weight"
    ),
    "lightx2v-dots": lambda p, m: _with_alpha(
        p, m, lambda n: f"unet.{n}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    ),
}


def write_lora(dialect: str, folder: Path, matrices: Matrices) -> Path:
    """A folder for peft, a .safetensors file for the others."""
    return DIALECTS[dialect](folder / (dialect if dialect == "peft" else f"{dialect}.safetensors"), matrices)
