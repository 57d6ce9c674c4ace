"""Reads and writes .safetensors files one tensor at a time.

A file consists of the header length (8 bytes), a JSON header and the values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.checksum import crc32
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.checksums import RecordCheck
from mindspeed_mm.models.containers.tensors import Container, TensorFile, mapped, raw_bytes
from mindspeed_mm.safetensors_header import read_safetensors_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SPELLING = {dtype: name for name, dtype in DTYPES.items()}
_CRC = "crc32."  # key prefix in __metadata__ of a tensor's CRC-32, which is 8 hexadecimal digits


def read_safetensors(paths: Iterable[Path]) -> Container:
    """Return all tensors of one or more files.

    Raises WeightsError if a file is damaged or two files contain the same name.
    """
    tensors: dict[str, TensorFile] = {}
    home: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _read_one(path).items():
            if name in tensors:
                raise WeightsError(
                    f"weight {name!r} is also in {home[name]}",
                    where=path,
                    fix="use the shards of one model only",
                )
            tensors[name], home[name] = tensor, path
    return Container(tensors)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorFile],
    *,
    written: Callable[[int], object] = lambda nbytes: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Stream `tensors` into a new file in the given order, with one tensor in memory at a time.

    `written` is called with the size of each tensor in bytes. `metadata` is added to the header, which also
    contains the checksums.
    """
    checksums = dict.fromkeys(tensors, "0" * 8)
    header = _header_text(tensors, checksums, metadata or {})
    with open(path, "wb") as file:
        file.write(header)
        for name, tensor in tensors.items():
            values = raw_bytes(tensor.read().contiguous())
            file.write(values)
            checksums[name] = f"{crc32(values):08x}"
            written(tensor.nbytes)
        file.seek(0)
        file.write(_header_text(tensors, checksums, metadata or {}))
        file.flush()
        os.fsync(file.fileno())


def _header_text(
    tensors: Mapping[str, TensorFile], checksums: Mapping[str, str], metadata: Mapping[str, str]
) -> bytes:
    """Return the header length and the JSON header. The checksums come last and do not change its size."""
    sums = {f"{_CRC}{name}": checksum for name, checksum in checksums.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, **sums}}
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _SPELLING[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_one(path: Path) -> dict[str, TensorFile]:
    header, start, end = read_safetensors_header(path, WeightsError)
    tensors: dict[str, TensorFile] = {}
    spans: list[tuple[int, int]] = []
    found = header.get("__metadata__")
    sums: Mapping[str, Any] = found if isinstance(found, dict) else {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, span = _entry(path, name, entry)
        if span[1] - span[0] != shape.numel() * dtype.itemsize or start + span[1] > end:
            raise WeightsError(
                f"is damaged: weight {name!r} does not fit its place", where=path, fix="copy the file again"
            )
        spans.append(span)
        check = RecordCheck(
            path, start + span[0], span[1] - span[0], sums.get(f"{_CRC}{name}"), name, len(tensors)
        )
        tensors[name] = _tensor_file(path, start + span[0], shape, dtype, check)
    _check_no_gaps(path, sorted(spans), end - start)
    return tensors


def _tensor_file(
    path: Path, offset: int, shape: torch.Size, dtype: torch.dtype, check: RecordCheck
) -> TensorFile:
    def read() -> Tensor:
        tensor = mapped(path, offset, shape, dtype)
        check.run(raw_bytes(tensor))
        return tensor

    return TensorFile(shape, dtype, read, raw=lambda: (mapped(path, offset, shape, dtype), check))


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, torch.Size, tuple[int, int]]:
    try:
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = (
            all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *span])
            and len(span) == 2
            and len(shape) < 16
        )
    except (TypeError, KeyError):
        sound = False
    if not sound or not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(
            f"weight {name!r} has an entry that cannot be read: {str(entry)[:100]}", where=path
        )
    return DTYPES[dtype], torch.Size(shape), (span[0], span[1])


def _check_no_gaps(path: Path, spans: list[tuple[int, int]], size: int) -> None:
    position = 0
    for begin, end in spans:
        if begin != position:
            raise WeightsError(
                "is damaged: its values overlap or leave a gap", where=path, fix="copy the file again"
            )
        position = end
    if position != size:
        raise WeightsError(
            f"is damaged: {size} bytes of values, not {position}", where=path, fix="copy the file again"
        )
