"""Reads one row of a dataset: resolves its files and checks its values."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_mm.data.config import MAX_REFERENCES, ClipRow
from mindspeed_mm.data.content import map_in_threads
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import (
    json_type,
    regular_file,
)
from mindspeed_mm.registry import did_you_mean

KEYS = tuple(ClipRow.model_fields)
_ALSO_CALLED = {  # keys of other projects that differ too much for a spelling suggestion
    other: f" (did you mean {key!r}?)"
    for key, names in {"src_video_mask": ("mask", "src_mask"), "cap": ("caption", "prompt", "text")}.items()
    for other in names
}
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode categories
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may contain lone ones, which UTF-8 cannot encode


@dataclass(frozen=True)
class Problem:
    """A reason why a row cannot be used."""

    address: str  # data.json[17].src_video
    message: str
    row: int  # index of the row in the whole dataset; -1 if the problem does not concern one row

    def __str__(self) -> str:
        return f"{self.address}: {self.message}"


@dataclass(frozen=True)
class NamedFile:
    """A file that a row names."""

    address: str
    path: Path
    row: int


@dataclass
class RowReader:
    """Reads one row and adds what is wrong with it to `problems`."""

    address: str
    row: int
    home: DatasetFolder
    values: Any
    problems: list[Problem]
    notes: dict[str, None]
    named: list[NamedFile] = field(default_factory=list)  # every file that the row names, good or bad

    def record(self) -> SampleRecord | None:
        before = len(self.problems)
        if isinstance(self.values, DataError):
            self._bad("", str(self.values))
            return None
        if not isinstance(self.values, Mapping):
            self._bad("", f"expected an object with {', '.join(KEYS)}; got {json_type(self.values)}")
            return None
        self._reject_unknown_keys()
        captions = self._captions()
        video = self._path("video", required=True)
        source, mask = self._path("src_video"), self._path("src_video_mask")
        references = self._references()
        if len(self.problems) > before or video is None:
            return None
        return SampleRecord(
            video=video,
            captions=captions,
            src_video=source,
            src_mask=mask,
            src_ref_images=references,
            address=self.address,
            row=self.row,
        )

    def _bad(self, key: str, message: str) -> None:
        self.problems.append(Problem(f"{self.address}.{key}" if key else self.address, message, self.row))

    def _reject_unknown_keys(self) -> None:
        for key in self.values:
            if key in KEYS:
                continue
            near = _ALSO_CALLED.get(key) or did_you_mean(str(key), list(KEYS))
            if near:
                self._bad(str(key), f"unknown key{near}; the keys are {', '.join(KEYS)}")
            else:
                self.notes.setdefault(f"key {key!r} of the dataset is not used")

    def _captions(self) -> tuple[str, ...]:
        found = self.values.get("cap")
        captions = [found] if isinstance(found, str) else found
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            self._bad("cap", f"expected a string or a list of strings, got {found!r:.60}")
            return ()
        broken = [caption for caption in captions if _SURROGATE.search(caption)]
        if broken:
            self._bad(
                "cap",
                f"{broken[0]!r:.60} contains a lone surrogate (half of a character); write the character",
            )
        if not captions or not all(map(_has_text, captions)):
            self._bad(
                "cap",
                "the caption is empty; write one (captions are dropped at training, see caption_dropout)",
            )
        return tuple(captions)

    def _path(self, key: str, *, required: bool = False) -> Path | None:
        found = self.values.get(key)
        if found in (None, "") and not required:
            return None
        if not isinstance(found, str) or not found:
            self._bad(key, "missing" if found in (None, "") else f"expected a path, got {found!r:.60}")
            return None
        return self._inside(key, found)

    def _references(self) -> tuple[Path, ...]:
        found = self.values.get("src_ref_images")
        if found in (None, "", []):
            return ()
        listed = [found] if isinstance(found, str) else found
        if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
            self._bad("src_ref_images", f"expected a list of paths, got {found!r:.60}")
            return ()
        if len(listed) > MAX_REFERENCES:
            self._bad("src_ref_images", f"expected at most {MAX_REFERENCES} images, got {len(listed)}")
            return ()
        paths = [self._inside(f"src_ref_images[{i}]", item) for i, item in enumerate(listed)]
        return tuple(path for path in paths if path is not None)

    def _inside(self, key: str, text: str) -> Path | None:
        path = self.home.folder / text
        if not self.home.holds(path):
            self._bad(
                key, f"{text} is outside the dataset's folder {self.home.folder}; move it there, or link it"
            )
            return None
        self.named.append(NamedFile(f"{self.address}.{key}", path, self.row))
        return path


@dataclass
class DatasetFolder:
    """The folder of a dataset, resolved once for all rows."""

    folder: Path

    @cached_property
    def absolute(self) -> str:
        return os.path.abspath(self.folder)

    @cached_property
    def real(self) -> str:
        return _real(self.folder)

    def holds(self, path: Path) -> bool:
        """Return whether `path` is the folder or inside it, by its name or with links resolved."""
        return _is_below(os.path.abspath(path), self.absolute) or _is_below(_real(path), self.real)


def _has_text(caption: str) -> bool:
    """Return whether `caption` contains a visible character."""
    return any(unicodedata.category(character) not in _INVISIBLE for character in caption)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _real(path: Path) -> str:
    """Resolve links in `path`, so that a folder and a link to it compare equal."""
    try:
        return os.path.realpath(path)
    except ValueError:  # the path contains NUL; the check reports the file as missing
        return os.path.abspath(path)


def missing_files(named: Sequence[NamedFile]) -> list[Problem]:
    """Return a problem for each missing file. Checks in many threads, because network storage is slow."""
    found = map_in_threads(lambda file: _why_missing(file.path), named)
    return [Problem(file.address, why, file.row) for file, why in zip(named, found, strict=True) if why]


def _why_missing(path: Path) -> str:
    """Return why `path`, a file or a folder of images, cannot be read; '' if it can."""
    try:
        regular_file(path, DataError, or_folder=True)
    except DataError as error:
        return str(error)
    return ""
