"""Reads the prepare.json of a finished dataset row, and checks that its files have not changed.

Does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from mindspeed_mm.checksum import file_crc32
from mindspeed_mm.conditioning.prepared import RECORD
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.files import read_json_object, stat_path
from mindspeed_mm.outputs import name_problem


class FileSum(Config):
    """The size in bytes and CRC-32 of a file."""

    size: int = Field(ge=0)
    crc32: int = Field(ge=0, lt=1 << 32)


class PreparedRow(Config):
    """The keys that a later run reads. Rows of earlier versions have no `files`."""

    model_config = ConfigDict(extra="allow")

    key: str
    video: str
    src_video: str | None = None
    src_mask: str | None = None
    src_ref_images: tuple[str, ...]
    notes: tuple[str, ...]
    files: dict[str, FileSum] = Field(default_factory=dict)

    @field_validator("video", "src_video", "src_mask", "src_ref_images", "files")
    @classmethod
    def _plain_names(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value or ():
            if problem := name_problem(name, ""):
                raise ValueError(problem)
        return value

    @property
    def names(self) -> set[str]:
        """The names of the files and folders of the row."""
        single = (name for name in (self.video, self.src_video, self.src_mask) if name)
        return {*single, *self.src_ref_images, *self.files}


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the size and CRC-32 of each named file in `folder`. Raises OSError."""
    return {
        name: {"size": os.stat(folder / name).st_size, "crc32": file_crc32(folder / name)} for name in names
    }


def read_finished(folder: Path, key: str) -> dict[str, Any] | None:
    """Read the prepare.json of a row.

    Returns None if it is malformed or has a different key, or if the files of the row have changed.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json_object(path, DataError)
        row = parse(PreparedRow, record, str(path))
        for name in row.names:
            stat_path(folder / name, DataError)
        sums = {name: entry.model_dump() for name, entry in row.files.items()}
        sizes_match = all(os.stat(folder / name).st_size == entry["size"] for name, entry in sums.items())
        return record if row.key == key and sizes_match and sums == sums_of(folder, sums) else None
    except (MindSpeedMMError, OSError):
        return None
