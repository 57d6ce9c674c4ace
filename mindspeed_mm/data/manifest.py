"""Reads manifests: data.txt → data.json / .jsonl / .csv / a folder of clips → SampleRecords.

Reports every problem of every row before anything is decoded. Does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.data import csv_rows
from mindspeed_mm.data.foreign import find_list, folder_rows, rename_keys
from mindspeed_mm.data.manifest_row import DatasetFolder, NamedFile, Problem, RowReader, missing_files
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import LIST_BYTES, json_lines, parse_json, read_text, write_json_lines
from mindspeed_mm.text_encoding import split_lines

FAILURES = "failed.jsonl"
_LISTS = (".json", ".jsonl", *csv_rows.SUFFIXES)  # a file with any other suffix is read as a data.txt
_SHOWN = 20


@dataclass(frozen=True)
class Manifest:
    """The well-formed rows of a dataset, the problems of the other rows, and remarks."""

    records: tuple[SampleRecord, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    rows: int  # all rows, good or bad


def lists_of(data_path: str | Path, data_folder: str | Path | None = None) -> list[Path]:
    """Return the lists that `scan_manifest` reads, and the folders without a list. Raises DataError."""
    given = Path(data_path)
    if os.path.isdir(given) and find_list(given) is None:
        given = given / "data.txt"
    found = _datasets(Path(data_path), None if data_folder is None else Path(data_folder))
    return [given, *(listing for _, listing in found)]


def read_manifest(data_path: str | Path, data_folder: str | Path | None = None) -> list[SampleRecord]:
    """Read all rows of a dataset. Raises DataError with the first 20 problems and a count of the others."""
    manifest = scan_manifest(data_path, data_folder)
    if manifest.problems:
        raise DataError(list_problems(manifest.problems, manifest.rows), fix="correct them")
    return list(manifest.records)


def scan_manifest(data_path: str | Path, data_folder: str | Path | None = None) -> Manifest:
    """Read a data.txt, data.json, .jsonl, .csv or a folder of clips, and check that the files exist.

    Raises DataError only if a list itself cannot be read. Problems of rows are listed in the manifest.
    """
    records: list[SampleRecord] = []
    problems: list[Problem] = []
    notes: dict[str, None] = {}
    named: list[NamedFile] = []
    row = 0
    datasets = list(_datasets(Path(data_path), None if data_folder is None else Path(data_folder)))
    same_name = len({listing.name for _, listing in datasets}) < len(datasets)
    for folder, listing in datasets:
        called = str(listing) if same_name else listing.name
        home = DatasetFolder(folder)
        for index, values in enumerate(_rows(listing, folder)):
            reader = RowReader(f"{called}[{index}]", row, home, values, problems, notes)
            found = reader.record()
            records += [] if found is None else [found]
            named += reader.named
            row += 1
    if not row:
        raise DataError("dataset has no rows", where=data_path)
    missing = missing_files(named)
    bad = {problem.row for problem in missing}
    kept = tuple(record for record in records if record.row not in bad)
    return Manifest(kept, tuple(sorted([*problems, *missing], key=lambda p: p.row)), tuple(notes), row)


def list_problems(problems: Sequence[Problem], rows: int) -> str:
    """Format problems as `3 of 40 rows cannot be used: data.json[1].video: …; …`."""
    bad = len({problem.row for problem in problems})
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{bad} of {rows} rows cannot be used: " + "; ".join(map(str, problems[:_SHOWN])) + more


def write_failures(folder: Path, failures: Sequence[tuple[int, str]]) -> None:
    """Write failed.jsonl: each row that cannot be used, and why. Without failures, no file is written."""
    path = folder / FAILURES
    if failures:
        write_json_lines(path, [{"row": row, "reason": reason} for row, reason in failures])
    else:
        path.unlink(missing_ok=True)


def _datasets(data_path: Path, data_folder: Path | None) -> Iterator[tuple[Path, Path]]:
    """Yield (folder, list) of each dataset. For a folder without a list, both are the folder."""
    if os.path.isdir(data_path):
        found = find_list(data_path)
        if found is not None or not os.path.isfile(data_path / "data.txt"):
            yield data_folder or data_path, found or data_path
            return
        data_path = data_path / "data.txt"
    if data_path.suffix.lower() in _LISTS:
        yield data_folder or data_path.parent, data_path
        return
    text = read_text(data_path, DataError, max_bytes=LIST_BYTES)
    csv_rows.reject_table(text, data_path)
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
    """Resolve `path` against the working directory, else against the folder of the file that names it."""
    beside = data_path.parent / path
    return beside if not os.path.exists(path) and os.path.exists(beside) else Path(path)


def _rows(listing: Path, folder: Path) -> Iterator[Any]:
    """Yield the rows of one dataset with the keys of a data.json, or a DataError for an unusable row."""
    if os.path.isdir(listing):
        yield from folder_rows(listing, folder)
        return
    yield from map(rename_keys, _listed_rows(listing))


def _listed_rows(listing: Path) -> Iterator[Any]:
    if listing.suffix.lower() in csv_rows.SUFFIXES:
        yield from csv_rows.read_csv_rows(listing)
        return
    text = read_text(listing, DataError, max_bytes=LIST_BYTES)
    if text.lstrip().startswith("["):
        yield from parse_json(text, str(listing), DataError, lone_surrogates=True)
        return
    csv_rows.reject_table(text, listing)
    try:
        for _, values in json_lines(text, str(listing), DataError, lone_surrogates=True):
            yield values
    except DataError as error:
        raise error.advise("write a JSON list, or one object per line") from None
