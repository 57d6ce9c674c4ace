"""PNG files as bytes, chunk by chunk: what Pillow does not write."""

from __future__ import annotations

import struct
import zlib

_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_bytes(
    side: int = 32, *, left_out: int = 0, cut_at: int | None = None, interlaced: bool = False
) -> bytes:
    """A gray-blue RGB picture with right checksums.

    `left_out`: rows at the end that are not there. `cut_at`: bytes of the packed pixels that are kept.
    """
    rows = _interlaced_rows(side) if interlaced else [side] * side
    pixels = b"".join(b"\0" + b"\x80\x80\x90" * width for width in rows[: len(rows) - left_out])
    packed = zlib.compress(pixels)[:cut_at]
    chunks = (
        (b"IHDR", struct.pack(">2I5B", side, side, 8, 2, 0, 0, int(interlaced))),
        (b"IDAT", packed),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        data += struct.pack(">I", len(content)) + kind + content
        data += struct.pack(">I", zlib.crc32(kind + content))
    return data


def _interlaced_rows(side: int) -> list[int]:
    """The widths of all rows of the seven passes, in their order."""
    return [
        len(range(left, side, across))
        for left, top, across, down in _PASSES
        for _ in range(top, side, down)
        if left < side
    ]
