"""Expands 8-bit weights to bf16 while they are read.

Three formats are supported: plain fp8; X.weight with X.scale_weight (`fp8_scaled` files, marked by an empty
`scaled_fp8`); and X.weight with X.weight_scale and a JSON X.comfy_quant. Activation scales
(`scale_input`, `input_scale`) are for fp8 matrix products and are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import parse_json
from mindspeed_mm.models.containers.tensors import FLOATS, TensorFile

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
_MOST_JSON = 4096  # maximum size of a comfy_quant in bytes
_FIX = "use a bf16, fp8, fp8_scaled or GGUF file of the same model"


def expand(tensors: Mapping[str, TensorFile], where: object, *, plain: bool = True) -> dict[str, TensorFile]:
    """Return `tensors` with every 8-bit weight expanded to bf16, and without scales and markers.

    With `plain`, fp8 weights without a scale are also expanded. Raises WeightsError for an unknown format,
    for a scale without a weight, for two scales of one weight, and for a scale of an unexpected shape or
    dtype.
    """
    if odd := next((name for name in tensors if _UNKNOWN.search(name)), None):
        raise WeightsError(
            f"is quantized in a form that is not read here: {odd}",
            where=str(where),
            fix=_FIX,
        )
    scales = _scales(tensors, where)
    formats = {
        name.removesuffix(_CONFIG): _format(name, tensor, where)
        for name, tensor in tensors.items()
        if name.endswith(_CONFIG)
    }
    for stem in sorted({*scales, *formats}):
        if f"{stem}.weight" not in tensors:
            raise WeightsError(f"has a scale for {stem}.weight, but no such weight", where=str(where))
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


def _scales(tensors: Mapping[str, TensorFile], where: object) -> dict[str, TensorFile]:
    """Map each weight's name, without `.weight`, to its scale."""
    found: dict[str, str] = {}
    for name in tensors:
        if not name.endswith(_SCALES):
            continue
        stem = _stem(name, _SCALES)
        if stem in found:
            raise WeightsError(
                f"has two scales of {stem}.weight: {found[stem]}, {name}", where=str(where), fix=_FIX
            )
        found[stem], dtype = name, tensors[name].dtype
        if dtype not in FLOATS:
            is_e8m0 = dtype == torch.uint8 or "e8m0" in str(dtype)  # powers of two, stored as exponents
            kind = "MXFP8 (e8m0) scales" if is_e8m0 else f"scales of {_short(dtype)}"
            raise WeightsError(
                f"got {kind}: {name}", where=str(where), expected="scales in F32, F16 or BF16", fix=_FIX
            )
    return {stem: tensors[name] for stem, name in found.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stem(name: str, endings: Iterable[str]) -> str:
    return next(name.removesuffix(ending) for ending in endings if name.endswith(ending))


def _format(name: str, tensor: TensorFile, where: object) -> torch.dtype:
    """Return the dtype of a layer's values as declared by its `comfy_quant`."""
    if tensor.dtype not in (torch.uint8, torch.int8) or tensor.nbytes > _MOST_JSON:
        raise WeightsError(f"{name} is not a short text", where=str(where))
    text = bytes(tensor.read().view(torch.uint8).tolist()).decode("utf-8", "replace")
    values = parse_json(text, f"{where}: {name}", WeightsError)
    form = values.get("format") if isinstance(values, dict) else None
    if not isinstance(form, str) or form not in _FORMATS:
        raise WeightsError(
            f"got format {form!r:.40}",
            where=f"{where}: {name}",
            expected=f"one of {', '.join(_FORMATS)}",
            fix="use a bf16, fp8 or GGUF file of the same model",
        )
    return _FORMATS[form]


def _scaled(
    name: str, tensor: TensorFile, scale: TensorFile, form: torch.dtype | None, where: object
) -> TensorFile:
    dtype = form or tensor.dtype
    if form is None and dtype in FLOATS:  # not quantized, in a file with quantized layers
        return TensorFile(tensor.shape, dtype, partial(_expanded, tensor, scale, dtype, dtype))
    is_known = tensor.dtype == dtype and (form is not None or dtype in FP8)
    if not is_known and not (form in FP8 and tensor.dtype == torch.uint8):  # fp8 stored as bytes
        named = f", its {_CONFIG[1:]} names {_short(form)}" if form else f" and no {_CONFIG[1:]}"
        raise WeightsError(
            f"got {_short(tensor.dtype)}: {name} has a scale{named}",
            where=str(where),
            expected="scaled weights in fp8, or in int8 with a comfy_quant",
            fix=_FIX,
        )
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
