"""Checks a GGUF file's header before the package `gguf` reads it.

`GGUFReader` creates an object for every value and trusts every length, so a file of 300 bytes can keep
it busy indefinitely.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of number → bytes
_STRING, _ARRAY = 8, 9
_SMALLEST = {**_SIZES, _STRING: 8, _ARRAY: 12}  # minimum size of a value of each type, in bytes
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 16  # values or tensors; published files have a few thousand
_MAX_ITEMS = 1 << 22  # in all arrays together; vocabularies have about a million
_MAX_NESTING = 4
_MAX_NAME = 65535  # bytes, the limit of the format
_MAX_DIMENSIONS = 8  # the format allows 4


def check_header(path: Path) -> None:
    """Check that no length exceeds the file, or what a weight file needs. Raises ValueError.

    Other damage is reported by the reader.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data).header()


class _Walk:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.items = 0

    def header(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.skip(4)
        version = self.number("I")
        if version and version & 0xFFFF == 0:  # the package would read its 8-bit scales in the wrong order
            raise ValueError("it is big-endian")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}, 2 and 3 are read")
        tensors, values = self.count("tensors", 24), self.count("values", 13)
        for _ in range(values):
            name = self.name()
            self.value(name, self.number("I"), 0)
        for _ in range(tensors):
            name = self.name()
            dimensions = self.number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            self.skip(8 * dimensions + 4 + 8)  # sizes, type, offset

    def count(self, what: str, smallest: int) -> int:
        found = self.number("Q")
        if found > min(_MAX_ENTRIES, self.left // smallest):
            raise ValueError(f"{found} {what}, in {len(self.data)} bytes")
        return found

    def value(self, name: str, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self.array(name, depth)
        else:
            raise ValueError(f"{name} has kind {kind}, which GGUF does not know")

    def array(self, name: str, depth: int) -> None:
        kind, length = self.number("I"), self.number("Q")
        if depth >= _MAX_NESTING:
            raise ValueError(f"{name} has arrays nested more than {_MAX_NESTING} deep")
        self.items += length
        if length * _SMALLEST.get(kind, 1) > self.left or self.items > _MAX_ITEMS:
            raise ValueError(f"{name} is an array of {length} values, {self.left} bytes are left")
        if kind in _SIZES:
            self.skip(length * _SIZES[kind])
            return
        for _ in range(length):
            self.value(name, kind, depth + 1)

    def name(self) -> str:
        length = self.number("Q")
        if length > _MAX_NAME:
            raise ValueError(f"a name of {length} bytes")
        start = self.at
        self.skip(length)
        return self.data[start : self.at].decode("utf-8", "replace")

    def number(self, code: str) -> int:
        start = self.at
        self.skip(struct.calcsize(f"<{code}"))
        found: int = struct.unpack(f"<{code}", self.data[start : self.at])[0]
        return found

    def skip(self, size: int) -> None:
        if size > self.left:
            raise ValueError("its header ends too early")
        self.at += size

    @property
    def left(self) -> int:
        return len(self.data) - self.at
