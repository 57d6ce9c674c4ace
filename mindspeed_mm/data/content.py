"""Facts about the files of a dataset: hashes of their contents, and what a probe found.

Both are cached by size and timestamp, so that a second run does not open the files. Files are looked up from
many threads, which hides the latency of network storage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from mindspeed_mm.data.probe import ClipInfo, probe, probe_mask, probe_picture, traits_of
from mindspeed_mm.data.sample import Kind
from mindspeed_mm.data.traits import REREAD
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import open_append, parse_json
from mindspeed_mm.text_encoding import split_lines

STATE_FOLDER = "state"  # subfolder of the features with caches of facts about files; may be deleted
_BLOCK = 1 << 20
Signature = str  # identifies the state of a file or folder; changes with its size or timestamp
Seen = dict[tuple[Kind, Path], tuple[Signature, ClipInfo]]
T = TypeVar("T")
R = TypeVar("R")
_THREADS = 32
# ThreadPoolExecutor.map does not chunk, and submitting a single item costs more than a local stat.
_AT_ONCE = 256


def digest_of(path: Path) -> str:
    """Hash the bytes of a file, or the names and bytes of a folder's files in order. Raises OSError."""
    found = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for file in _files(path):
            found.update(f"{file.relative_to(path).as_posix()}\0{digest_of(file)}\0".encode())
        return found.hexdigest()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def content_of(path: Path) -> str:
    """Return the hash of a file's bytes, followed by `|` and its traits that version 0.1 read differently.

    Raises OSError and DataError.
    """
    found = ",".join(sorted(REREAD & set(traits_of(path))))
    digest = digest_of(path)
    return f"{digest}|{found}" if found else digest


def signed_content(path: Path) -> tuple[Signature, str]:
    """Return the signature of a file before it is read, and its content. Raises OSError and DataError."""
    signature = signature_of(path)
    return signature, content_of(path)


def signature_of(path: Path) -> Signature:
    """Return the size and timestamp of a file, or of everything in a folder. Raises OSError."""
    if path.is_dir():
        listed = "\n".join(
            f"{file.relative_to(path).as_posix()} {signature_of(file)}" for file in _files(path)
        )
        return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def digest_of_values(values: Mapping[str, Any]) -> str:
    """Hash plain values; the order of keys does not matter."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def map_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply `function` to every item and return the results in order. Exceptions propagate."""

    def apply(start: int) -> list[R]:
        return [function(item) for item in items[start : start + _AT_ONCE]]

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return [result for results in pool.map(apply, range(0, len(items), _AT_ONCE)) for result in results]


class ClipIndex:
    """Cache of probe results, keyed by the size and timestamp of each file.

    A second check of a dataset does not open files that passed the first one. The cache is a file of JSON
    lines in a folder. Incomplete lines are ignored. If the folder is not writable, nothing is cached on disk.
    """

    _FILE = "clips.4.jsonl"  # the number changes when `probe` detects more problems

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / self._FILE
        self._known: dict[tuple[str, str], tuple[Signature, dict[str, Any]]] = {}
        for line in read_lines(self._path) if self._path is not None and self._path.is_file() else ():
            if len(line) == 4 and isinstance(line[3], dict):
                self._known[str(line[0]), str(line[1])] = (str(line[2]), line[3])

    def get(self, kind: Kind, path: Path) -> ClipInfo | None:
        """Return the result for a file if it was probed and has not changed since, else None."""
        known = self._known.get((kind, os.path.abspath(path)))
        try:
            if not known or known[0] != signature_of(path):
                return None
            facts: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in known[1].items()
            }
            return ClipInfo(path=path, **facts)
        except (OSError, TypeError):
            return None

    def get_many(self, files: Sequence[tuple[Kind, Path]]) -> dict[tuple[Kind, Path], ClipInfo]:
        """Return the cached results of `files`; files without one are left out."""
        found = map_in_threads(lambda file: self.get(*file), files)
        return {file: info for file, info in zip(files, found, strict=True) if info is not None}

    def add(self, seen: Seen) -> None:
        """Store results, each with the file's signature, taken before the file was opened."""
        lines: list[list[Any]] = []
        for (kind, path), (signature, info) in seen.items():
            facts = {name: value for name, value in asdict(info).items() if name != "path"}
            lines.append([kind, os.path.abspath(path), signature, facts])
        if self._path is None or not lines:
            return
        try:
            append_lines(self._path, lines)
        except OSError:
            self._path = None


def probe_cached(kind: Kind, path: Path, known: Mapping[tuple[Kind, Path], ClipInfo], seen: Seen) -> ClipInfo:
    """Return the facts about a file from `known`, or probe the file and add the result to `seen`.

    Raises DataError.
    """
    info = known.get((kind, path))
    if info is None:
        try:
            signature = signature_of(path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=path) from None
        info = {"picture": probe_picture, "mask": probe_mask, "clip": probe}[kind](path)
        seen[kind, path] = (signature, info)
    return info


class ContentIndex:
    """Map from paths to hashes, stored in a folder. Each rank appends lines to its own file.

    An incomplete last line is ignored.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._path = folder / f"contents2.{rank}.jsonl"
        self._known: dict[str, tuple[Signature, str]] = {}
        for file in sorted(folder.glob("contents2.*.jsonl")):
            self._known.update({line[0]: (line[1], line[2]) for line in read_lines(file) if len(line) == 3})

    def get(self, path: Path) -> str | None:
        """Return the hash of `path` if it is cached and the file has not changed since, else None."""
        known = self._known.get(os.path.abspath(path))
        try:
            return known[1] if known and known[0] == signature_of(path) else None
        except OSError:
            return None

    def add(self, found: Mapping[Path, tuple[Signature, str]]) -> None:
        """Store hashes, each with the file's signature, taken before the file was read."""
        fresh = {os.path.abspath(path): value for path, value in found.items()}
        fresh = {name: value for name, value in fresh.items() if self._known.get(name) != value}
        if not fresh:
            return
        self._known.update(fresh)
        append_lines(self._path, [[name, *value] for name, value in fresh.items()])


class PartIndex:
    """Map from the key of a feature's part (`latents`, `prompts`) to the name of a feature with that part.

    Stored like ContentIndex. The feature may have been deleted since.
    """

    def __init__(self, folder: Path, part: Literal["latents", "prompts"], rank: int = 0) -> None:
        self._path = folder / f"{part}.{rank}.jsonl"
        self._known: dict[str, str] = {}
        for file in sorted(folder.glob(f"{part}.*.jsonl")):
            self._known.update({line[0]: line[1] for line in read_lines(file) if len(line) == 2})

    def get(self, key: str) -> str | None:
        """Return the name of a feature with this part, or None."""
        return self._known.get(key)

    def add(self, key: str, feature: str) -> None:
        """Store a feature. It replaces an earlier one with the same part."""
        if self._known.get(key) != feature:
            self._known[key] = feature
            append_lines(self._path, [[key, feature]])


def read_lines(file: Path) -> Iterator[list[Any]]:
    """Yield the JSON lists in a file, one per line. Incomplete lines are skipped."""
    for line in split_lines(file.read_bytes().decode("utf-8", errors="replace")):
        try:
            values = parse_json(line, file.name, DataError)
        except DataError:
            continue
        if isinstance(values, list):
            yield values


def append_lines(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    """Append JSON lists to a file, one per line. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_append(path) as file:
        # Begin with a newline: a killed process may have left the last line incomplete.
        file.write(("\n" + "".join(json.dumps(line) + "\n" for line in lines)).encode())
