"""Reader for GGUF files of image and video models. It needs the optional package `gguf`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.gguf_header import check_header
from mindspeed_mm.models.containers.tensors import Container, TensorFile, first_line

_ORIGINAL = "comfy.gguf.orig_shape."  # key prefix for shapes of more than GGUF's 4 dimensions
_MOST_DIMENSIONS = 8
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_gguf(path: Path) -> Container:
    """Read all tensors, quantized ones as bf16.

    Raises WeightsError if the package is not installed or the file is damaged.
    """
    try:
        import gguf
    except ImportError:
        raise WeightsError("GGUF needs the package gguf", where=path, fix="pip install gguf") from None
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        exact = {"F32": torch.float32, "F16": torch.float16}
        tensors = {}
        for entry in reader.tensors:
            kind = entry.tensor_type.name
            shape = _shape(reader, entry)
            read = partial(_read, path, entry.name, entry.data, entry.tensor_type, shape, exact.get(kind))
            tensors[entry.name] = TensorFile(shape, exact.get(kind, torch.bfloat16), read)
    except _DAMAGE as error:
        raise WeightsError(
            f"cannot be read as GGUF ({first_line(error)})", where=path, fix="download the file again"
        ) from None
    return Container(tensors)


def _shape(reader: Any, entry: Any) -> torch.Size:
    """Return the shape of an entry. GGUF stores the fastest-varying dimension first."""
    found = tuple(reversed([int(size) for size in entry.shape]))
    field = reader.get_field(_ORIGINAL + entry.name)
    if field is None:
        return torch.Size(found)
    original = torch.Size(int(field.parts[part][0]) for part in field.data)
    fits = len(original) <= _MOST_DIMENSIONS and min(original, default=0) >= 0
    if not fits or original.numel() != torch.Size(found).numel():
        raise ValueError(f"{entry.name} {list(found)} cannot have the shape {list(original)}")
    return original


def _read(
    path: Path, name: str, data: Any, kind: Any, shape: torch.Size, dtype: torch.dtype | None
) -> Tensor:
    import gguf

    if dtype is not None:
        return torch.from_numpy(data.copy()).view(shape)
    try:
        with np.errstate(all="ignore"):  # loading reports weights with infinite scales
            values = gguf.quants.dequantize(data, kind)
    except (NotImplementedError, ValueError) as error:
        raise WeightsError(
            f"{name} is {kind.name}, which the package gguf does not expand ({first_line(error)})",
            where=path,
            fix="use a Q4, Q5, Q6 or Q8 file, or update the package",
        ) from None
    return torch.from_numpy(values).view(shape).to(torch.bfloat16)
