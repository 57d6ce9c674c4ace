"""Weights that a file holds in 8 bits, expanded to bf16 as they are read.

Plain fp8; X.weight beside X.scale_weight (`fp8_scaled` files, marked by an empty `scaled_fp8`); X.weight
beside X.weight_scale, with an X.comfy_quant of JSON. Scales of activations (`scale_input`, `input_scale`) are
for products in fp8, and are not needed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import parse_json
from mindspeed_mm.models.containers.tensors import TensorFile

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".scale_weight", ".weight_scale")
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_CONFIG = ".comfy_quant"
_MARK = re.compile(r"(^|\.)scaled_fp8$")
_UNKNOWN = re.compile(r"\.(weight_scale_2|pre_quant_scale|weight_zero_point|qweight|qzeros|SCB|absmax)$")
_FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_blockwise": torch.int8,
    "int8_tensorwise": torch.int8,
}
_MOST_JSON = 4096  # bytes of a comfy_quant


def expand(tensors: Mapping[str, TensorFile], where: object, *, plain: bool = True) -> dict[str, TensorFile]:
    """`tensors` with every 8-bit weight as a bf16 one, and without scales and marks.

    `plain`: fp8 weights without a scale, too. Raises WeightsError for a format that is not known, a
    scale without a weight, or one of another shape.
    """
    if odd := next((name for name in tensors if _UNKNOWN.search(name)), None):
        raise WeightsError(
            f"is quantised in a form that is not read here: {odd}",
            where=str(where),
            fix="take a bf16, fp8, fp8_scaled or GGUF file of the same model",
        )
    scales = {_stem(name, _SCALES): tensor for name, tensor in tensors.items() if name.endswith(_SCALES)}
    formats = {
        name.removesuffix(_CONFIG): _format(name, tensor, where)
        for name, tensor in tensors.items()
        if name.endswith(_CONFIG)
    }
    for stem in sorted({*scales, *formats}):
        if f"{stem}.weight" not in tensors:
            raise WeightsError(f"has a scale for {stem}.weight, and no such weight", where=str(where))
    found = {}
    for name, tensor in tensors.items():
        if name.endswith((*_SCALES, *_OF_ACTIVATIONS, _CONFIG)) or _MARK.search(name):
            continue
        stem = name.removesuffix(".weight")
        if stem in scales and stem != name:
            found[name] = _scaled(name, tensor, scales[stem], formats.get(stem), where)
        elif tensor.dtype in FP8 and plain:
            found[name] = TensorFile(tensor.shape, torch.bfloat16, partial(_as_bf16, tensor))
        else:
            found[name] = tensor
    return found


def _stem(name: str, endings: Iterable[str]) -> str:
    return next(name.removesuffix(ending) for ending in endings if name.endswith(ending))


def _format(name: str, tensor: TensorFile, where: object) -> torch.dtype:
    """The dtype that a `comfy_quant` says its layer's values have."""
    if tensor.dtype not in (torch.uint8, torch.int8) or tensor.nbytes > _MOST_JSON:
        raise WeightsError(f"{name} is no short text", where=str(where))
    text = bytes(tensor.read().view(torch.uint8).tolist()).decode("utf-8", "replace")
    values = parse_json(text, f"{where}: {name}", WeightsError)
    form = values.get("format") if isinstance(values, dict) else None
    if not isinstance(form, str) or form not in _FORMATS:
        raise WeightsError(
            f"got format {form!r:.40}",
            where=f"{where}: {name}",
            expected=f"one of {', '.join(_FORMATS)}",
            fix="take a bf16, fp8 or GGUF file of the same model",
        )
    return _FORMATS[form]


def _scaled(
    name: str, tensor: TensorFile, scale: TensorFile, form: torch.dtype | None, where: object
) -> TensorFile:
    dtype = form or tensor.dtype
    if dtype.itemsize != 1 or tensor.dtype.itemsize != 1:
        if dtype == tensor.dtype and dtype.is_floating_point:  # left exact beside layers that are not
            return TensorFile(tensor.shape, dtype, partial(_expanded, tensor, scale, dtype, dtype))
        raise WeightsError(f"{name} is {tensor.dtype} and has a scale", where=str(where))
    blocks = len(scale.shape) == len(tensor.shape) == 2 and all(
        part and whole % part == 0 for whole, part in zip(tensor.shape, scale.shape, strict=True)
    )
    if scale.shape.numel() != 1 and tuple(scale.shape) != (tensor.shape[0],) and not blocks:
        raise WeightsError(
            f"{name} {list(tensor.shape)} has a scale of {list(scale.shape)}",
            where=str(where),
            expected="one number, one for each row, or one for each block",
        )
    return TensorFile(tensor.shape, torch.bfloat16, partial(_expanded, tensor, scale, dtype, torch.bfloat16))


def _expanded(tensor: TensorFile, scale: TensorFile, form: torch.dtype, dtype: torch.dtype) -> Tensor:
    values = tensor.read().view(form).float()
    factor = scale.read().float()
    if factor.numel() == 1:
        return values.mul_(factor.reshape(())).to(dtype)
    if factor.ndim == 1:
        return values.mul_(factor.view(-1, *(1 for _ in tensor.shape[1:]))).to(dtype)
    rows, columns = (whole // part for whole, part in zip(tensor.shape, factor.shape, strict=True))
    blocks = values.view(factor.shape[0], rows, factor.shape[1], columns)
    return blocks.mul_(factor[:, None, :, None]).view(tensor.shape).to(dtype)


def _as_bf16(tensor: TensorFile) -> Tensor:
    return tensor.read().to(torch.bfloat16)
