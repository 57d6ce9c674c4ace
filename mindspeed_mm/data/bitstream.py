"""Detects size changes and truncation in video files without decoding.

Does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEAD = 4096  # bytes of a key frame that are examined; parameter sets come first
# codec → (first bytes of units that contain the size, first bytes of units that contain picture data)
_UNITS: dict[str, tuple[frozenset[int], frozenset[int]]] = {
    "h264": (
        frozenset(b for b in range(256) if b & 31 == 7),
        frozenset(b for b in range(256) if 1 <= b & 31 <= 5),
    ),
    "hevc": (frozenset({0x42, 0x43}), frozenset(range(64))),
    "mpeg1video": (frozenset({0xB3}), frozenset({0})),
    "mpeg2video": (frozenset({0xB3}), frozenset({0})),
    "mpeg4": (frozenset(range(0x20, 0x30)), frozenset({0xB6})),
}
# codec → the bytes of each frame that hold its size
_FIELDS = {
    "vp8": slice(6, 10),
    "prores": slice(16, 20),
    "dnxhd": slice(24, 28),
    "png": slice(16, 24),
}
_FIXED = frozenset(
    {"ffv1", "ffvhuff", "huffyuv", "utvideo", "rawvideo", "qtrle", "gif", "theora", "wmv1", "wmv2", "wmv3"}
)


class SizeWatch:
    """Compares the bytes that hold the size in each key frame.

    `unsure` is set when they differ or cannot be read. Only decoding can then tell whether the size changes.
    """

    def __init__(self, codec: Any) -> None:
        self.unsure = False
        self._codec: str = codec.codec.canonical_name  # a decoder may have another name
        extradata = bytes(codec.extradata or b"")
        self._prefix = _prefix_length(self._codec, extradata)
        self._seen = set(_parameter_sets(self._codec, extradata) if self._codec in _UNITS else ())

    def add(self, head: bytes) -> None:
        """Examine the first `HEAD` bytes of a key frame."""
        if self._codec in _UNITS:
            units = _prefixed(head, self._prefix) if self._prefix else _start_coded(head)
            found, complete = self._find_sizes(units)
            self._seen.update(found)
            self.unsure |= not complete
        elif self._codec in _FIELDS:
            self._seen.add(head[_FIELDS[self._codec]])
        elif self._codec in _READ:
            size = _READ[self._codec](head)
            self.unsure |= size is None
            self._seen.add(size or b"")
        elif self._codec not in _FIXED:
            self.unsure = True
        self.unsure |= len(self._seen) > 1

    def _find_sizes(self, units: Iterator[bytes]) -> tuple[list[bytes], bool]:
        """Return the sizes before the first picture data, and whether picture data was reached."""
        sizes, pictures = _UNITS[self._codec]
        found = []
        for unit in units:
            if unit and unit[0] in sizes:
                found.append(_size_part(self._codec, unit))
            elif unit and unit[0] in pictures:
                return found, True
        return found, False


def _jpeg_size(head: bytes) -> bytes | None:
    """Return height and width from a baseline or progressive frame header, as bytes."""
    found = re.search(rb"\xff[\xc0-\xc3]\0.\x08(.{4})", head, re.DOTALL)
    return found.group(1) if found else None


def _vp9_size(head: bytes) -> bytes | None:
    """Return width and height from the uncompressed header of a key frame, as bytes."""
    bits, position = int.from_bytes(head[:16].ljust(16, b"\0"), "big"), 0

    def take(count: int) -> int:
        nonlocal position
        position += count
        return bits >> (128 - position) & ((1 << count) - 1)

    marker, low, high = take(2), take(1), take(1)
    profile = low + 2 * high
    take(int(profile == 3))
    existing, inter, _, sync = take(1), take(1), take(2), take(24)
    if marker != 2 or existing or inter or sync != 0x498342:
        return None
    take(int(profile >= 2))
    is_rgb = take(3) == 7
    take(0 if is_rgb else 1)
    take((1 if is_rgb else 3) if profile & 1 else 0)
    return take(32).to_bytes(4, "big")


def _av1_size(head: bytes) -> bytes | None:
    """Return the sequence header, or None if none precedes the frame data."""
    offset = 0
    while offset < len(head) and head[offset] & 2:  # the unit contains its length
        kind, offset = head[offset] >> 3 & 15, offset + 1 + (head[offset] >> 2 & 1)
        length = shift = 0
        while offset < len(head):
            byte = head[offset]
            length, shift, offset = length | (byte & 127) << shift, shift + 7, offset + 1
            if byte < 128:
                break
        if kind == 1:
            return head[offset : offset + length]
        if kind in (3, 6):
            return None
        offset += length
    return None


_READ: dict[str, Callable[[bytes], bytes | None]] = {"mjpeg": _jpeg_size, "vp9": _vp9_size, "av1": _av1_size}


def _size_part(codec: str, unit: bytes) -> bytes:
    return unit[1:4] if codec.startswith(("mpeg1", "mpeg2")) else unit.rstrip(b"\0")


def _prefix_length(codec: str, extradata: bytes) -> int:
    """Return the size in bytes of the length before each unit in MP4 and Matroska; 0 = start codes."""
    offset = {"h264": 4, "hevc": 21}.get(codec, len(extradata))
    return (extradata[offset] & 3) + 1 if extradata[:1] == b"\1" and offset < len(extradata) else 0


def _parameter_sets(codec: str, extradata: bytes) -> Iterator[bytes]:
    """Yield the parts of a stream's header that contain the size."""
    if not _prefix_length(codec, extradata):
        units = _start_coded(extradata)
    elif codec == "h264":
        units = _prefixed(extradata[6:], 2, extradata[5] & 31)
    else:
        units = _hevc_units(extradata)
    yield from (_size_part(codec, unit) for unit in units if unit and unit[0] in _UNITS[codec][0])


def _hevc_units(extradata: bytes) -> Iterator[bytes]:
    offset = 23
    for _ in range(extradata[22] if len(extradata) > 22 else 0):
        for _ in range(int.from_bytes(extradata[offset + 1 : offset + 3], "big")):
            length = int.from_bytes(extradata[offset + 3 : offset + 5], "big")
            yield extradata[offset + 5 : offset + 5 + length]
            offset += 2 + length
        offset += 3


def _prefixed(data: bytes, prefix: int, max_units: int = 1 << 16) -> Iterator[bytes]:
    offset = 0
    while max_units and offset + prefix < len(data):
        length = int.from_bytes(data[offset : offset + prefix], "big")
        yield data[offset + prefix : offset + prefix + length]
        offset, max_units = offset + prefix + length, max_units - 1


def _start_coded(data: bytes) -> Iterator[bytes]:
    start = data.find(b"\0\0\1")
    while start >= 0:
        end = data.find(b"\0\0\1", start + 3)
        yield data[start + 3 : end if end >= 0 else len(data)]
        start = end


def packet_head(packet: Any) -> bytes:
    """Return the first `HEAD` bytes of a packet."""
    return memoryview(packet)[:HEAD].tobytes()


def has_several_descriptions(path: Path) -> bool:
    """Return whether an MP4 or MOV has more than one sample description for a stream.

    The frame size may differ between them.
    """
    with open(path, "rb") as file:
        while len(header := file.read(8)) == 8:
            size, kind = int.from_bytes(header[:4], "big"), header[4:]
            body = (int.from_bytes(file.read(8), "big") - 16) if size == 1 else size - 8
            if kind == b"moov":
                return re.search(rb"stsd\0{4}(?!\0\0\0\x01)", file.read(body)) is not None
            if body < 0:
                return False
            file.seek(body, os.SEEK_CUR)
    return False


def may_end_inside_a_frame(path: Path, program: int) -> bool:
    """Return whether the last packet of PID `program` in a transport stream is full.

    A complete frame usually ends in a padded packet.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 18)) // (188 * 192) * (188 * 192))  # a multiple of both packet lengths
        tail = file.read()
    step, first = (192, 4) if tail[4:5] == tail[196:197] == b"\x47" and tail[188:189] != b"\x47" else (188, 0)
    if len(tail) % step:
        return True
    for offset in range(len(tail) - step + first, -1, -step):
        if tail[offset : offset + 1] != b"\x47":
            return True
        if int.from_bytes(tail[offset + 1 : offset + 3], "big") & 0x1FFF == program:
            padded = tail[offset + 3] & 0x20 and tail[offset + 4] > (7 if tail[offset + 5] & 0x10 else 1)
            return not padded
    return True
