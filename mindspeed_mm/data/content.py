"""Which contents files have: hashes, remembered by size and time stamp so that a second run reads nothing."""

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

STATE_FOLDER = "state"  # in the folder of the features: what was learnt about files; may be deleted
_BLOCK = 1 << 20
Signature = str  # of one file or folder: changes whenever its size or time stamp does


def digest_of(path: Path) -> str:
    """Hash of a file's bytes; of a folder, of its files' names and bytes in order. Raises OSError."""
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
    """Size and time stamp of a file; of a folder, of everything in it. Raises OSError."""
    if path.is_dir():
        listed = "\n".join(
            f"{file.relative_to(path).as_posix()} {signature_of(file)}" for file in _files(path)
        )
        return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}"


def digest_of_values(values: Mapping[str, Any]) -> str:
    """Hash of plain values; the order of keys does not matter."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class ContentIndex:
    """path → hash, kept in a folder as lines that each rank appends to a file of its own.

    A torn last line is ignored.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._path = folder / f"contents2.{rank}.jsonl"
        self._known: dict[str, tuple[Signature, str]] = {}
        for file in sorted(folder.glob("contents2.*.jsonl")):
            self._known.update({line[0]: (line[1], line[2]) for line in read_lines(file) if len(line) == 3})

    def get(self, path: Path) -> str | None:
        """The hash of `path` if it is known and the file has not changed since."""
        known = self._known.get(os.path.abspath(path))
        try:
            return known[1] if known and known[0] == signature_of(path) else None
        except OSError:
            return None

    def add(self, found: Mapping[Path, tuple[Signature, str]]) -> None:
        """Remember hashes, each with the signature that was taken before the file was read."""
        fresh = {os.path.abspath(path): value for path, value in found.items()}
        fresh = {name: value for name, value in fresh.items() if self._known.get(name) != value}
        if not fresh:
            return
        self._known.update(fresh)
        append_lines(self._path, [[name, *value] for name, value in fresh.items()])


class PartIndex:
    """What decides a part of features (`latents`, `prompts`) → the name of a feature that holds it.

    Kept as ContentIndex is; a feature may be gone since.
    """

    def __init__(self, folder: Path, part: Literal["latents", "prompts"], rank: int = 0) -> None:
        self._path = folder / f"{part}.{rank}.jsonl"
        self._known: dict[str, str] = {}
        for file in sorted(folder.glob(f"{part}.*.jsonl")):
            self._known.update({line[0]: line[1] for line in read_lines(file) if len(line) == 2})

    def get(self, key: str) -> str | None:
        """The feature, if one is known."""
        return self._known.get(key)

    def add(self, key: str, feature: str) -> None:
        """Remember a feature; the latest one stands for all that share the part."""
        if self._known.get(key) != feature:
            self._known[key] = feature
            append_lines(self._path, [[key, feature]])


def read_lines(file: Path) -> Iterator[list[Any]]:
    """The JSON lists of a file, one a line; a line that was torn is left out."""
    for line in split_lines(file.read_bytes().decode("utf-8", errors="replace")):
        try:
            values = parse_json(line, file.name, DataError)
        except DataError:
            continue
        if isinstance(values, list):
            yield values


def append_lines(path: Path, lines: Sequence[Sequence[Any]]) -> None:
    """Add JSON lists to a file, one a line. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_append(path) as file:
        # the empty line first: the last one may have been torn by a kill
        file.write(("\n" + "".join(json.dumps(line) + "\n" for line in lines)).encode())
