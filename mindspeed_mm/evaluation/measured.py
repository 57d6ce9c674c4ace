"""Records what scores were measured from, to check later whether they are still valid. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindspeed_mm.checksum import crc32, file_crc32
from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import DataError
from mindspeed_mm.evaluation.results import Result
from mindspeed_mm.files import display_path


class Measured(Config):
    """The files and settings that scores were measured from. "" and None mean not given."""

    files: str = ""  # checksum of all videos, settings and inputs
    task: str = ""
    annotators: str | None = None
    encoder: str | None = None
    data: str | None = None

    def holds(self, now: Measured) -> bool:
        """Return whether the files are those of `now`, and every setting that `now` has is equal."""
        named = {name: value for name, value in now if value and name != "files"}
        return bool(self.files) and self.files == now.files and named.items() <= dict(self).items()

    @property
    def settings(self) -> str:
        """The settings as text for a message."""
        named = [f"--{name} {value}" for name, value in self if value and name != "files"]
        return " ".join(named) or "no setting"


def absolute(path: str | None) -> str | None:
    """Return `path` as an absolute path with links resolved, or None."""
    return None if path is None else os.path.realpath(path)


def files_checksum(results: Sequence[Result]) -> str:
    """Return a checksum of the names and bytes of all files that scoring reads. Raises DataError."""
    total = 0
    for result in results:
        for path in _files(result):
            try:
                found = file_crc32(path)
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror}", where=display_path(path)) from None
            total = crc32(f"{result.name}/{path.name} {found:08x}\n".encode(), total)
    return f"{total:08x}"


def _files(result: Result) -> Iterator[Path]:
    yield result.video
    given = result.inputs
    named = [given.get("video"), given.get("mask"), *(given.get("images") or ())]
    beside = [result.video.with_suffix(".json"), *result.input_files]
    for path in (*beside, *(Path(name) for name in named if isinstance(name, str) and name)):
        if path.is_file():
            yield path
