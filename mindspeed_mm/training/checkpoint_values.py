"""Validated access to the entries of a training checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.training.state import PACKED_BYTES, unpack

_LARGEST = 1 << 53  # largest count


class Values:
    """Validated access to the entries of one checkpoint.

    Each method raises WeightsError that names the entry if its value is not allowed.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.entries = folder, metadata.state_dict_metadata

    def error(self, name: str, expected: str, found: object) -> WeightsError:
        return WeightsError(
            f"got {brief(found)}",
            where=f"{self.folder}: {name}",
            expected=expected,
            fix="load another iteration, or copy this one again",
        )

    def tensor(self, name: str) -> TensorStorageMetadata | None:
        entry = self.entries.get(name)
        if entry is not None and not isinstance(entry, TensorStorageMetadata):
            raise self.error(name, "a tensor", "a pickled value")
        return entry

    def count(self, name: str) -> Tensor:
        """Allocate a tensor to load one integer into."""
        entry = self.tensor(name)
        if entry is None:
            raise self.error(name, "a whole number", "nothing")
        if entry.size.numel() != 1 or entry.properties.dtype.is_floating_point or len(entry.size) > 0:
            raise self.error(name, "one whole number", f"{entry.properties.dtype} {list(entry.size)}")
        return torch.zeros(entry.size, dtype=entry.properties.dtype)

    def read_count(self, name: str, value: Tensor) -> int:
        if not is_count(number := int(value)):
            raise self.error(name, f"a number from 0 to {_LARGEST}", number)
        return number

    def packed(self, name: str) -> list[Tensor]:
        """Allocate a tensor to load packed bytes into, or return [] if the checkpoint has no such entry."""
        entry = self.tensor(name)
        if entry is None:
            return []
        if entry.properties.dtype != torch.uint8 or len(entry.size) != 1 or entry.size.numel() > PACKED_BYTES:
            raise self.error(
                name, f"at most {PACKED_BYTES} bytes", f"{entry.properties.dtype} {list(entry.size)}"
            )
        return [torch.zeros(entry.size, dtype=torch.uint8)]

    def unpack(self, name: str, value: Tensor) -> Any:
        """Decode packed bytes to plain numbers and strings."""
        return unpack(value, f"{self.folder}: {name}")


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def brief(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
