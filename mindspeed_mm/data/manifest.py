"""data.txt → data.json / .jsonl / .csv / a folder of clips → SampleRecords.

Every problem of every row is found before anything is decoded. No torch.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mindspeed_mm.data import csv_rows
from mindspeed_mm.data.config import MAX_REFERENCES, ClipRow
from mindspeed_mm.data.foreign import folder_rows, list_in, under_our_keys
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.threads import map_in_threads
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import (
    LIST_BYTES,
    json_lines,
    json_type,
    parse_json,
    read_text,
    regular_file,
    split_lines,
    write_json_lines,
)
from mindspeed_mm.registry import did_you_mean

KEYS = tuple(ClipRow.model_fields)
FAILURES = "failed.jsonl"
_ALSO_CALLED = {  # names of other projects that no spelling brings near
    other: f" (did you mean {key!r}?)"
    for key, names in {"src_video_mask": ("mask", "src_mask"), "cap": ("caption", "prompt", "text")}.items()
    for other in names
}
_LISTS = (".json", ".jsonl", *csv_rows.SUFFIXES)  # anything else is a data.txt
_SHOWN = 20
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode categories
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may carry one alone; no file can be written with it


@dataclass(frozen=True)
class Problem:
    """Something that makes a row unusable."""

    address: str  # data.json[17].src_video
    message: str
    row: int  # place of the row in the whole dataset; -1 when it is not about one row

    def __str__(self) -> str:
        return f"{self.address}: {self.message}"


@dataclass(frozen=True)
class Manifest:
    """The rows of a dataset that are well-formed, the problems of those that are not, and remarks."""

    records: tuple[SampleRecord, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    rows: int  # all rows, good or bad


def lists_of(data_path: str | Path, data_folder: str | Path | None = None) -> list[Path]:
    """The lists that `scan_manifest` reads, and the folders without one. Raises DataError."""
    given = Path(data_path)
    if os.path.isdir(given) and list_in(given) is None:
        given = given / "data.txt"
    found = _datasets(Path(data_path), None if data_folder is None else Path(data_folder))
    return [given, *(listing for _, listing in found)]


def read_manifest(data_path: str | Path, data_folder: str | Path | None = None) -> list[SampleRecord]:
    """All rows of a dataset. Raises DataError listing every bad row (the first 20 and a count)."""
    manifest = scan_manifest(data_path, data_folder)
    if manifest.problems:
        raise DataError(list_problems(manifest.problems, manifest.rows))
    return list(manifest.records)


def scan_manifest(data_path: str | Path, data_folder: str | Path | None = None) -> Manifest:
    """Read a data.txt, data.json, .jsonl, .csv or a folder of clips and look whether the files are there.

    Raises DataError only when a list itself cannot be read; what is wrong with rows is in the answer.
    """
    records: list[SampleRecord] = []
    problems: list[Problem] = []
    notes: dict[str, None] = {}
    named: list[_Named] = []
    row = 0
    datasets = list(_datasets(Path(data_path), None if data_folder is None else Path(data_folder)))
    same_name = len({listing.name for _, listing in datasets}) < len(datasets)
    for folder, listing in datasets:
        called = str(listing) if same_name else listing.name
        home = _Home(folder)
        for place, values in enumerate(_rows(listing, folder)):
            reader = _Row(f"{called}[{place}]", row, home, values, problems, notes)
            found = reader.record()
            records += [] if found is None else [found]
            named += reader.named
            row += 1
    if not row:
        raise DataError("dataset has no rows", where=data_path)
    missing = _missing_files(named)
    bad = {problem.row for problem in missing}
    kept = tuple(record for record in records if record.row not in bad)
    return Manifest(kept, tuple(sorted([*problems, *missing], key=lambda p: p.row)), tuple(notes), row)


def list_problems(problems: Sequence[Problem], rows: int) -> str:
    """`3 of 40 rows cannot be used: data.json[1].video: …; …`"""
    bad = len({problem.row for problem in problems})
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{bad} of {rows} rows cannot be used: " + "; ".join(map(str, problems[:_SHOWN])) + more


def write_failures(folder: Path, failures: Sequence[tuple[int, str]]) -> None:
    """failed.jsonl: each row that cannot be used, and why; no file when there is none."""
    path = folder / FAILURES
    if failures:
        write_json_lines(path, [{"row": row, "reason": reason} for row, reason in failures])
    else:
        path.unlink(missing_ok=True)


def _datasets(data_path: Path, data_folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """(folder, list) of each dataset; a folder without a list is its own."""
    if os.path.isdir(data_path):
        found = list_in(data_path)
        if found is not None or not os.path.isfile(data_path / "data.txt"):
            yield data_folder or data_path, found or data_path
            return
        data_path = data_path / "data.txt"
    if data_path.suffix.lower() in _LISTS:
        yield data_folder or data_path.parent, data_path
        return
    text = read_text(data_path, DataError, max_bytes=LIST_BYTES)
    csv_rows.refuse_table(text, data_path)
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        folder, comma, listing = (part.strip() for part in line.rpartition(","))
        if not comma or not folder or not listing:
            raise DataError(
                f"got {line.strip()!r}", where=f"{data_path}:{number}", expected="`folder,path/to/data.json`"
            )
        if not os.path.isdir(_near(data_path, folder)):
            raise DataError(
                f"no such folder (working directory {Path.cwd()})", where=f"{data_path}:{number}: {folder}"
            )
        yield _near(data_path, folder), _near(data_path, listing)


def _near(data_path: Path, path: str) -> Path:
    """`path` from the working directory, or, where that is not there, from beside the file that names it."""
    beside = data_path.parent / path
    return beside if not os.path.exists(path) and os.path.exists(beside) else Path(path)


def _rows(listing: Path, folder: Path) -> Iterator[Any]:
    """The rows of one dataset under our keys; a DataError stands for one that cannot be made."""
    if os.path.isdir(listing):
        yield from folder_rows(listing, folder)
        return
    yield from map(under_our_keys, _listed_rows(listing))


def _listed_rows(listing: Path) -> Iterator[Any]:
    if listing.suffix.lower() in csv_rows.SUFFIXES:
        yield from csv_rows.read_csv_rows(listing)
        return
    text = read_text(listing, DataError, max_bytes=LIST_BYTES)
    if text.lstrip().startswith("["):
        yield from parse_json(text, str(listing), DataError, lone_surrogates=True)
        return
    csv_rows.refuse_table(text, listing)
    try:
        for _, values in json_lines(text, str(listing), DataError, lone_surrogates=True):
            yield values
    except DataError as error:
        raise error.advise("write a JSON list, or one object per line") from None


@dataclass(frozen=True)
class _Named:
    """A file that a row names."""

    address: str
    path: Path
    row: int


@dataclass
class _Row:
    """One row while it is read; what is wrong with it goes to `problems`."""

    address: str
    row: int
    home: _Home
    values: Any
    problems: list[Problem]
    notes: dict[str, None]
    named: list[_Named] = field(default_factory=list)  # every file that the row names, good or bad

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
            self._bad("cap", f"found {found!r:.60}, wanted a text or a list of texts")
            return ()
        broken = [caption for caption in captions if _SURROGATE.search(caption)]
        if broken:
            self._bad(
                "cap", f"{broken[0]!r:.60} holds half of a character (a lone surrogate); write the whole one"
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
            self._bad(key, "missing" if found in (None, "") else f"found {found!r:.60}, wanted a path")
            return None
        return self._inside(key, found)

    def _references(self) -> tuple[Path, ...]:
        found = self.values.get("src_ref_images")
        if found in (None, "", []):
            return ()
        listed = [found] if isinstance(found, str) else found
        if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
            self._bad("src_ref_images", f"found {found!r:.60}, wanted a list of paths")
            return ()
        if len(listed) > MAX_REFERENCES:
            self._bad("src_ref_images", f"found {len(listed)} images, expected at most {MAX_REFERENCES}")
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
        self.named.append(_Named(f"{self.address}.{key}", path, self.row))
        return path


@dataclass
class _Home:
    """The dataset's folder, resolved once for all rows."""

    folder: Path

    @cached_property
    def absolute(self) -> str:
        return os.path.abspath(self.folder)

    @cached_property
    def real(self) -> str:
        return _real(self.folder)

    def holds(self, path: Path) -> bool:
        """Whether `path` is the folder or below it, by its name or with links resolved."""
        return _is_below(os.path.abspath(path), self.absolute) or _is_below(_real(path), self.real)


def _has_text(caption: str) -> bool:
    """Whether there is anything to see in it: white space, control and zero-width characters are nothing."""
    return any(unicodedata.category(character) not in _INVISIBLE for character in caption)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _real(path: Path) -> str:
    """With links resolved: a folder that is reached by a link is the same place."""
    try:
        return os.path.realpath(path)
    except ValueError:  # NUL: reported as a file that cannot be there
        return os.path.abspath(path)


def _missing_files(named: Sequence[_Named]) -> list[Problem]:
    """Looked up by many threads: on network storage each look takes its time."""
    found = map_in_threads(lambda file: _why_missing(file.path), named)
    return [Problem(file.address, why, file.row) for file, why in zip(named, found, strict=True) if why]


def _why_missing(path: Path) -> str:
    """Why nothing can be read at `path`, which may be a folder of images; empty when it can."""
    try:
        regular_file(path, DataError, or_folder=True)
    except DataError as error:
        return str(error)
    return ""


def files_of(record: SampleRecord) -> list[tuple[str, Path]]:
    """The row's files with the keys they stand under."""
    single = [("video", record.video), ("src_video", record.src_video), ("src_video_mask", record.src_mask)]
    references = [(f"src_ref_images[{i}]", path) for i, path in enumerate(record.src_ref_images)]
    return [(key, path) for key, path in single if path is not None] + references
