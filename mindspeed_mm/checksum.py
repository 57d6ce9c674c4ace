"""CRC-32, the checksum of all files that this package writes, and of the records in a zip file.

Uses ISA-L if it is installed, because it is faster than zlib.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this processor
    from zlib import crc32

__all__ = ["Record", "crc32", "damaged_record", "file_crc32", "record_start", "stored_sizes", "zip_records"]


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file's bytes. Raises OSError."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total = crc32(block, total)
    return total


class Record(NamedTuple):
    """An uncompressed file in a zip: where its bytes are, and their CRC-32."""

    start: int
    size: int
    crc: int
    name: str


def zip_records(file: BinaryIO) -> list[Record]:
    """Return the uncompressed records of a zip that have a CRC-32, in file order. torch writes 0 for none.

    Raises zipfile.BadZipFile for a damaged directory.
    """
    with zipfile.ZipFile(file) as archive:
        entries = [
            entry for entry in archive.infolist() if entry.CRC and entry.compress_type == zipfile.ZIP_STORED
        ]
        return sorted(
            Record(record_start(file, e), e.file_size, e.CRC, e.filename.rpartition("/")[2]) for e in entries
        )


def stored_sizes(path: Path) -> dict[int, int]:
    """Return offset → size in bytes for each uncompressed record of a zip.

    Raises zipfile.BadZipFile and OSError.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
        return {record_start(file, entry): entry.file_size for entry in entries}


def record_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return the offset of a record's bytes, which follow a local header with two variable-length fields."""
    file.seek(entry.header_offset + 26)
    lengths = file.read(4)
    return (
        entry.header_offset
        + 30
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )


def damaged_record(piece: bytes | memoryview, file: BinaryIO) -> str | None:
    """Return the name of the first record that does not match its CRC-32. `piece` has the bytes of `file`."""
    view = memoryview(piece)
    for start, size, crc, name in zip_records(file):
        if crc32(view[start : start + size]) != crc:
            return name
    return None
