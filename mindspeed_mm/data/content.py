"""Hashes of file contents, cached by size and timestamp so that a second run does not read the files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mindspeed_mm.errors import DataError
from mindspeed_mm.files import open_append, parse_json
from mindspeed_mm.text_encoding import split_lines

STATE_FOLDER = "state"  # subfolder of the features with caches of facts about files; may be deleted
_BLOCK = 1 << 20
Signature = str  # identifies the state of a file or folder; changes with its size or timestamp


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
        """Store hashes, each with the file's signature from before the file was read."""
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
