"""Reads and writes safetensors files with checksums.

The metadata contains the CRC-32 of each tensor's bytes as `crc32.NAME`, and of the header without that entry
as `crc32`. Files without checksums can be read too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mindspeed_mm.checksum import crc32
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import atomic_path, regular_file
from mindspeed_mm.safetensors_header import read_safetensors_header

_CRC = "crc32"


def write_packed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file atomically.

    The header is sorted, because safetensors writes metadata in random order. Equal tensors give equal files.
    """
    packed = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    sums = {f"{_CRC}.{name}": _crc_of(value) for name, value in packed.items()}
    raw = save(packed, {**without_checksums(metadata), **sums})
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"][_CRC] = _crc_of_header(header)
    text = _text(header)
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(raw)[8 + length :])


def read_packed(
    path: Path, required: Sequence[str], *, prefix: str = "", verify: bool = True
) -> dict[str, Tensor]:
    """Read the tensors whose names start with `prefix`.

    `verify` compares them with their checksums, if the file has any. Raises DataError if the file is missing
    or damaged, or if it lacks a tensor in `required`.
    """
    regular_file(path, DataError)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {name: file.get_tensor(name) for name in names}
            sums = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"cannot be read as safetensors: {reason}", where=path, fix="extract it again"
        ) from None
    missing = [name for name in required if name not in tensors]
    if missing:
        raise DataError(
            f"{', '.join(missing)} missing; file contains {', '.join(sorted(tensors))}", where=path
        )
    for name, tensor in tensors.items() if verify else ():
        expected = sums.get(f"{_CRC}.{name}")
        if expected is not None and expected != (found := _crc_of(tensor)):
            raise DataError(
                f"{name} is damaged: its checksum is {found}, but {expected} was written",
                where=path,
                fix="create the file again, or copy it again from its source",
            )
    return tensors


def read_header(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the JSON header of a safetensors file.

    Raises DataError if the file is missing, its length does not match the header, or the header is damaged.
    """
    header, start, size = read_safetensors_header(path, DataError)
    end = _end(path, header)
    if size != start + end:
        raise DataError(
            f"has {size} bytes, but its header describes {start + end}", where=path, fix="extract it again"
        )
    expected = header.get("__metadata__", {}).get(_CRC)
    if verify and expected is not None and expected != _crc_of_header(header):
        raise DataError(
            "header is damaged: its checksum does not match",
            where=path,
            fix="create the file again",
        )
    return header


def without_checksums(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without checksums."""
    return {key: value for key, value in metadata.items() if key.partition(".")[0] != _CRC}


def _end(path: Path, header: Any) -> int:
    """Return the offset at which the last tensor ends. Raises DataError for an invalid header."""
    try:
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("__metadata__")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        for name, entry in header.items():
            if name != "__metadata__" and not all(type(n) is int and n >= 0 for n in entry["shape"]):
                raise TypeError(name)
        return max(map(int, ends), default=0)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise DataError("not a safetensors file: its header does not describe tensors", where=path) from None


def _crc_of(tensor: Tensor) -> str:
    if tensor.numel() == 0:
        return f"{crc32(b''):08x}"
    return f"{crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


def _crc_of_header(header: Mapping[str, Any]) -> str:
    metadata = {key: value for key, value in header["__metadata__"].items() if key != _CRC}
    return f"{crc32(_text({**header, '__metadata__': metadata})):08x}"


def _text(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
