"""Writers of tiny files in 8 bits, each as its program writes it, and what each of them rounds to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = Mapping[str, Tensor]
E4M3 = torch.float8_e4m3fn


def is_linear(name: str, weight: Tensor) -> bool:
    """What these programs round: the linear layers of the blocks."""
    return weight.ndim == 2 and "blocks." in name


def write_plain_fp8(path: Path, weights: Weights) -> Weights:
    """Comfy-Org's *_fp8_e4m3fn files: everything that is a matrix, without scales."""
    found = {n: w.to(E4M3) if is_linear(n, w) else w.to(torch.bfloat16) for n, w in weights.items()}
    save_file(found, path)
    return {name: weight.float() for name, weight in found.items()}


def write_fp8_scaled(path: Path, weights: Weights, prefix: str = "") -> Weights:
    """Comfy-Org's *_fp8_scaled files: scale_weight, scale_input, and an empty scaled_fp8."""
    found, rounded = {f"{prefix}scaled_fp8": torch.empty(0, dtype=E4M3)}, {}
    for name, weight in weights.items():
        if not is_linear(name, weight):
            found[prefix + name], rounded[name] = weight.half(), weight.half().float()
            continue
        scale = weight.abs().max() / 448
        values, stem = (weight / scale).to(E4M3), prefix + name.removesuffix(".weight")
        found |= {f"{stem}.weight": values, f"{stem}.scale_weight": scale.view(1)}
        found[f"{stem}.scale_input"] = torch.ones(1)
        rounded[name] = values.float() * scale
    save_file(found, path)
    return rounded


def write_comfy_quant(path: Path, weights: Weights) -> Weights:
    """ComfyUI's later form: comfy_quant holds JSON; one layer in blocks of int8, the others in fp8."""
    found, rounded = {}, {}
    for name, weight in weights.items():
        if not is_linear(name, weight):
            found[name], rounded[name] = weight.bfloat16(), weight.bfloat16().float()
            continue
        stem, form = name.removesuffix(".weight"), "float8_e4m3fn"
        if name.endswith("ffn.0.weight"):
            form, half = "int8_blockwise", weight.shape[1] // 2
            scale = torch.stack([weight[:, :half].abs().max(), weight[:, half:].abs().max()])[None] / 127
            wide = scale.repeat_interleave(half, dim=1)
            values = (weight / wide).round().to(torch.int8)
            rounded[name] = values.float() * wide
        else:
            scale = weight.abs().max() / 448
            values = (weight / scale).to(E4M3)
            rounded[name] = values.float() * scale
        text = json.dumps({"format": form}).encode()
        found |= {name: values, f"{stem}.weight_scale": scale, f"{stem}.input_scale": torch.tensor(1.0)}
        found[f"{stem}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(found, path)
    return rounded


def write_gguf(path: Path, weights: Weights) -> Weights:
    """city96's conversions: Q8_0 or BF16 matrices, others F32, five dimensions flattened."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "wan")
    rounded = {}
    for name, weight in weights.items():
        values = weight.float().numpy()
        if is_linear(name, weight) and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
        elif weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.BF16
        else:
            kind = gguf.GGMLQuantizationType.F32
        if weight.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in weight.shape])
            values = values.reshape(weight.shape[0], -1)
        data = values if kind.name == "F32" else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        back = values if kind.name == "F32" else gguf.quants.dequantize(data, kind)
        rounded[name] = torch.from_numpy(back.copy()).view(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


FORMS: Mapping[str, Callable[[Path, Weights], Weights]] = {
    "fp8.safetensors": write_plain_fp8,
    "fp8_scaled.safetensors": write_fp8_scaled,
    "comfy_quant.safetensors": write_comfy_quant,
    "q8.gguf": write_gguf,
}
