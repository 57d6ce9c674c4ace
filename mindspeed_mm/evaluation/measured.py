"""What the scores of a folder were measured from, to check later whether they are still valid. No torch."""

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
    """The files and settings of scores; "" and None mean not given."""

    files: str = ""  # checksum of all videos, settings and inputs
    task: str = ""
    annotators: str | None = None
    encoder: str | None = None
    data: str | None = None

    def holds(self, now: Measured) -> bool:
        """Whether these scores are of the same files, with the same value for each setting that `now` has."""
        named = {name: value for name, value in now if value and name != "files"}
        return bool(self.files) and self.files == now.files and named.items() <= dict(self).items()

    @property
    def settings(self) -> str:
        """The settings, for a message."""
        named = [f"--{name} {value}" for name, value in self if value and name != "files"]
        return " ".join(named) or "no setting"


def absolute(path: str | None) -> str | None:
    """An absolute path, independent of the working directory."""
    return None if path is None else os.path.realpath(path)


def files_checksum(results: Sequence[Result]) -> str:
    """Checksum of the names and bytes of all files that scoring `results` reads. Raises DataError."""
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
