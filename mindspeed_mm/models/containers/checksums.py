"""CRC-32 checksums of weight files.

Zip files contain their own checksums; those of a checkpoint folder are in `checksums.json`.

Checksums are verified while values are read, unless `MINDSPEED_MM_VERIFY_CHECKSUMS=0` or `verifying(False)`
turns this off. They detect damaged and mixed-up files. They do not stop an attacker, who can also replace the
checksums.
"""

from __future__ import annotations

import bisect
import json
import mmap
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mindspeed_mm.checksum import crc32, record_start, zip_records
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import read_text, regular_file
from mindspeed_mm.log import get_logger

logger = get_logger(__name__)
FILE = "checksums.json"
VARIABLE = "MINDSPEED_MM_VERIFY_CHECKSUMS"
SKIP = f"or set {VARIABLE}=0 to read it as it is"


class _Policy(NamedTuple):
    enabled: bool
    # If several processes read one file, this one verifies records part, part + parts, …
    part: int = 0
    parts: int = 1


_DEFAULT = _Policy(True)
_POLICY: ContextVar[_Policy | None] = ContextVar("verify_checksums", default=None)


@contextmanager
def verifying(enabled: bool, part: int = 0, parts: int = 1) -> Iterator[None]:
    """Turn checksum verification on or off within the block.

    If several processes on one machine share the work, this one verifies share `part` of `parts`.
    """
    token = _POLICY.set(_Policy(enabled, part, parts))
    try:
        yield
    finally:
        _POLICY.reset(token)


def verifies() -> bool:
    """Return whether verification is currently on."""
    return (_POLICY.get() or _DEFAULT).enabled and os.environ.get(VARIABLE, "1") != "0"


def is_mine(number: int) -> bool:
    """Return whether this process verifies record `number` of a file."""
    policy = _POLICY.get() or _DEFAULT
    return verifies() and number % policy.parts == policy.part


class RecordCheck:
    """Verifies one byte range of a file, once, when it is first read."""

    def __init__(
        self, path: Path, start: int, size: int, expected: str | None, name: str, number: int
    ) -> None:
        """Create the check of one range.

        `expected` is the CRC-32 in hexadecimal digits, or None if it is unknown. `number` is the index of the
        range in its file.
        """
        self._path, self._start, self._size, self._name = path, start, size, name
        self._expected, self._number, self._done = expected, number, expected is None

    @property
    def is_due(self) -> bool:
        """Whether this process must still verify the range."""
        return not self._done and is_mine(self._number)

    def run(self, values: memoryview | None = None, *, always: bool = False) -> None:
        """Verify the range if it is assigned to this process. With `always`, verify it in every process.

        `values` are mapped bytes, which are used if they cover the whole range. Raises WeightsError if
        the checksum is wrong.
        """
        if self._done or not (verifies() if always else is_mine(self._number)):
            return
        if values is not None and values.nbytes == self._size:
            self.compare(crc32(values))
            return
        with open(self._path, "rb") as file:
            self.compare(crc_of(file, self._start, self._size))

    def compare(self, crc: int) -> None:
        """Check a CRC-32 that the caller computed over the whole range. Raises WeightsError if it differs."""
        if f"{crc:08x}" != self._expected:
            raise WeightsError(
                f"is damaged: {self._name} has checksum {crc:08x}, not {self._expected}",
                where=self._path,
                fix=f"copy the file again, {SKIP}",
            )
        self._done = True


class ZipFileChecks:
    """Verifies the records of one .pt or .pth file when they are first read."""

    def __init__(self, path: Path) -> None:
        """Read the zip directory, and verify the pickle and the other small records immediately.

        Raises WeightsError, or BadZipFile for a damaged directory.
        """
        with open(path, "rb") as file:
            records = zip_records(file)
        self._starts = [record.start for record in records]
        self._checks = [
            RecordCheck(path, start, size, f"{crc:08x}", f"record {name}", number)
            for number, (start, size, crc, name) in enumerate(records)
        ]
        for record, check in zip(records, self._checks, strict=True):
            if record.size < 1 << 20 and not record.name.isdigit():
                check.run(always=True)

    def find(self, offset: int) -> RecordCheck | None:
        """Return the check of the record that contains the byte at `offset`."""
        number = bisect.bisect_right(self._starts, offset) - 1
        return self._checks[number] if number >= 0 else None

    def check_all(self) -> None:
        """Verify every record. Raises WeightsError."""
        for check in self._checks:
            check.run(always=True)


def fill_in_checksums(file: BinaryIO, checksums: Mapping[int, int]) -> None:
    """Write the CRC-32 of each record in `checksums` (offset → CRC-32), for which torch wrote 0.

    Each is written to the zip directory and to the data descriptor after the record.
    """
    file.flush()
    with zipfile.ZipFile(file) as archive:
        position, entries = archive.start_dir, archive.infolist()
        for entry in entries:
            file.seek(position)
            head, start = file.read(46), record_start(file, entry)
            if start in checksums:
                crc = checksums[start].to_bytes(4, "little")
                file.seek(position + 16)
                file.write(crc)
                file.seek(start + entry.file_size)
                if file.read(4) == b"PK\x07\x08":
                    file.write(crc)
            position += 46 + sum(int.from_bytes(head[at : at + 2], "little") for at in (28, 30, 32))


def crc_of(file: BinaryIO, start: int, size: int) -> int:
    """Return the CRC-32 of `size` bytes at `start`, or up to the end of the file. Maps without copying."""
    size = min(size, os.fstat(file.fileno()).st_size - start)
    if size <= 0:
        return 0
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with (
        mmap.mmap(file.fileno(), start - first + size, access=mmap.ACCESS_READ, offset=first) as window,
        memoryview(window) as view,
        view[start - first :] as values,
    ):
        return crc32(values)


@dataclass(frozen=True)
class FileSums:
    """Checksums of one file of a checkpoint.

    `size` is in bytes. `pieces` maps the offset of each piece to its CRC-32; for a file without pieces,
    offset 0 maps to the CRC-32 of the whole file.
    """

    size: int
    pieces: Mapping[int, int]

    def fits(self, path: Path) -> bool:
        """Return whether the size and all checksums of the file at `path` match."""
        starts = sorted(self.pieces)
        ends = [*starts[1:], self.size]
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == self.size and all(
                crc_of(file, start, end - start) == self.pieces[start]
                for start, end in zip(starts, ends, strict=True)
            )


@dataclass(frozen=True)
class Checksums:
    """Content of `checksums.json`: checksums of the files of one checkpoint."""

    folder: Path
    iteration: int | None
    files: Mapping[str, FileSums]

    def check_file(self, path: Path, content: bytes) -> None:
        """Check that `content` matches what was saved in the small file at `path`. Raises WeightsError."""
        known = self.files.get(path.name)
        if known is not None and (len(content) != known.size or crc32(content) != known.pieces.get(0)):
            raise self._explain(path)

    def check_size(self, path: Path, size: int) -> None:
        """Check that the file at `path` was saved with `size` bytes. Raises WeightsError."""
        known = self.files.get(path.name)
        if known is None:
            raise self._explain(path)
        if size != known.size:
            regular_file(path, WeightsError)  # raises a specific error for a Git LFS pointer
            raise self._explain(path, f" ({size} bytes, not {known.size})")

    def check_piece(self, path: Path, offset: int, piece: bytes, name: str) -> None:
        """Check that `piece` matches what was saved at `offset` in the file `path`. Raises WeightsError."""
        if crc32(piece) != self.files[path.name].pieces.get(offset):
            raise self._explain(path, f" (in {name})")

    def _explain(self, path: Path, detail: str = "") -> WeightsError:
        for other in sorted(self.folder.parent.glob(f"*/{FILE}")):
            if other.parent.name != self.folder.name and not other.parent.name.startswith("."):
                known = _parse(other, other.parent)
                if known is not None and path.name in known.files and known.files[path.name].fits(path):
                    return WeightsError(
                        f"belongs to iteration {known.iteration}, not {self.iteration}{detail}",
                        where=path,
                        fix=f"copy this file of {self.folder.name} again",
                    )
        return WeightsError(
            f"is damaged or of another checkpoint: its checksum is not the one in {FILE}{detail}",
            where=path,
            fix=f"copy {self.folder.name} again, {SKIP}",
        )


def read_checksums(folder: Path) -> Checksums | None:
    """Read checksums.json of a checkpoint.

    Returns None if the file does not exist or verification is off. Raises WeightsError if it is damaged.
    """
    path = folder / FILE
    if not verifies() or not os.path.lexists(path):
        return None
    found = _parse(path, folder)
    if found is None:
        raise WeightsError("is damaged", where=path, fix=f"copy it again, {SKIP}")
    return found


def write_checksums(folder: Path, iteration: int | None, files: Mapping[str, FileSums]) -> None:
    """Write checksums.json to a checkpoint folder, before the folder gets its final name. Raises OSError."""
    rows = {
        name: {
            "size": sums.size,
            "crc32": {str(offset): f"{crc:08x}" for offset, crc in sorted(sums.pieces.items())},
        }
        for name, sums in sorted(files.items())
    }
    text = json.dumps({"version": 1, "iteration": iteration, "files": rows})
    with open(folder / FILE, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _parse(path: Path, folder: Path) -> Checksums | None:
    """Parse a checksums.json. Returns None if the file is not valid."""
    try:
        values: Any = json.loads(read_text(path, WeightsError))
        files = {
            str(name): FileSums(
                int(row["size"]), {int(offset): int(crc, 16) for offset, crc in row["crc32"].items()}
            )
            for name, row in values["files"].items()
        }
        iteration = values["iteration"]
    except (WeightsError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if iteration is not None and type(iteration) is not int:
        return None
    return Checksums(folder, iteration, files)
