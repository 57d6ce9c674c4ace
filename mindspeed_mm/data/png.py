"""Checks that a PNG contains all its rows. Decoders fill missing rows with black. Does not import torch."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from mindspeed_mm.errors import DataError

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_BLOCK = 1 << 20  # bytes per decompression step


def check_rows(path: Path) -> None:
    """Raise DataError for a PNG whose pixels end early. Pillow's `verify` must have checked its chunks."""
    with path.open("rb") as file:
        file.seek(16)
        width, height, depth, color, _, _, interlaced = struct.unpack(">2I5B", file.read(13))
        file.seek(4, 1)  # the checksum
        needed = _unpacked_bytes(width, height, depth * _CHANNELS[color], interlaced=bool(interlaced))
        found, unpacker = 0, zlib.decompressobj()
        while found < needed and (head := file.read(8)) and head[4:] != b"IEND":
            size = int.from_bytes(head[:4], "big")
            if head[4:] != b"IDAT":
                file.seek(size + 4, 1)
                continue
            packed = file.read(size)
            file.seek(4, 1)
            while packed and found < needed and not unpacker.eof:
                found += len(unpacker.decompress(packed, _BLOCK))
                packed = unpacker.unconsumed_tail
    if found < needed:
        raise DataError(f"pixel data ends early: {found} of {needed} bytes", fix="save it again")


def _unpacked_bytes(width: int, height: int, bits: int, *, interlaced: bool) -> int:
    """Return the size of all rows in bytes, each with one byte for its filter. `bits` is bits per pixel."""
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        total += max(0, rows) * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    return total
