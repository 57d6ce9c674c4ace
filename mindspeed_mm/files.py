"""Reads text, JSON and JSON lines, and writes them atomically. No torch.

Readers take the class of error to raise, such as ConfigError for a config and DataError for a dataset. Every
error is one line with the file and, if known, the line and column. No reader blocks on a FIFO, recurses
without limit, or accepts what cannot be written back: NaN, a lone surrogate, a duplicate key.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mindspeed_mm.errors import ConfigError, MindSpeedMMError, printable
from mindspeed_mm.leftovers import temporary_name
from mindspeed_mm.text_encoding import decode_text, split_lines

PathLike = str | os.PathLike[str]
ErrorType = type[MindSpeedMMError]

CONFIG_BYTES = 64 << 20  # maximum size, far above any config, index or prompt list
LIST_BYTES = 4 << 30  # maximum size of a list of clips
MAX_DEPTH = 100  # maximum nesting of lists and objects
_MAX_DIGITS = 40  # maximum digits of an integer; 2^64 has 20
_LFS_POINTER = b"version https://git-lfs"
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}  # other tools treat them as line ends
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO (a pipe)"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


# Which files are accepted


def regular_file(path: PathLike, error: ErrorType = ConfigError, *, or_folder: bool = False) -> Path:
    """Check that `path` is a regular file or, with `or_folder`, a folder. Never blocks.

    Raises `error` if it is missing, a dangling link, a folder, FIFO, socket or device, an invalid path, or a
    Git LFS pointer.
    """
    status = stat_path(path, error)
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode) and not (or_folder and kind == "folder"):
            raise error(f"got a {kind}", where=display_path(path), expected="a file")
    if status.st_size < 1024 and stat.S_ISREG(status.st_mode):
        _refuse_lfs_pointer(Path(path), error)
    return Path(path)


def stat_path(path: PathLike, error: ErrorType = ConfigError) -> os.stat_result:
    """Return the `os.stat` result of a file or folder. Follows links.

    Raises `error` if it is missing or its path is invalid.
    """
    try:
        return os.stat(path)
    except (OSError, ValueError) as problem:
        raise error(path_problem(path, problem), where=display_path(path)) from None


def display_path(path: PathLike) -> str:
    """Return a path for a message: one line of at most 200 characters."""
    return printable(os.fspath(path), 200)


def path_problem(path: PathLike, problem: Exception) -> str:
    text = os.fspath(path)
    if isinstance(problem, ValueError):
        return "the path contains a character that no file name can have (NUL, or half of a surrogate pair)"
    code = problem.errno if isinstance(problem, OSError) else None
    if code == errno.ENAMETOOLONG:
        longest = max(len(part) for part in os.fsencode(text).split(b"/"))
        return (
            f"the path is too long for the file system ({len(text)} characters, longest name {longest} bytes)"
        )
    if code == errno.ENOENT:
        if os.path.islink(text):
            return f"a link to {os.readlink(text)}, which does not exist; restore its target"
        return f"no such file (working directory {_working_directory()})"
    if code == errno.ENOTDIR:
        return "no such file: a parent of it is a file, not a folder"
    if code == errno.EACCES:
        return "permission denied"
    if code == errno.ELOOP:
        return "a link that leads back to itself"
    return f"cannot be read: {getattr(problem, 'strerror', None) or problem}"


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "deleted"


def _refuse_lfs_pointer(path: Path, error: ErrorType) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as problem:
        raise error(path_problem(path, problem), where=display_path(path)) from None
    if head.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d{1,20})\s*$", head, re.MULTILINE)
        of = f" of a file of {_readable_size(int(size[1]))}" if size else ""
        raise error(
            f"a Git LFS pointer{of}", where=display_path(path), fix="fetch the file with `git lfs pull`"
        )


def _readable_size(size: int) -> str:
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


# Text


def read_text(path: PathLike, error: ErrorType = ConfigError, *, max_bytes: int = CONFIG_BYTES) -> str:
    """Read a UTF-8 file without its byte order mark.

    Raises `error` if it is missing, too large or in another encoding.
    """
    regular_file(path, error)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Reads exactly `size` bytes, because read(n) allocates n bytes even for a shorter file.
            data = file.read(size) if size <= max_bytes else b""
    except OSError as problem:
        raise error(path_problem(path, problem), where=display_path(path)) from None
    if size > max_bytes:
        expected = f"at most {_readable_size(max_bytes)}"
        raise error(f"got {_readable_size(size)}", where=display_path(path), expected=expected)
    return decode_text(data, display_path(path), error)


# JSON


def read_json(path: PathLike, error: ErrorType = ConfigError, *, max_bytes: int = CONFIG_BYTES) -> Any:
    """Read a JSON file. Raises `error`."""
    return parse_json(read_text(path, error, max_bytes=max_bytes), display_path(path), error)


def read_json_object(path: PathLike, error: ErrorType = ConfigError) -> dict[str, Any]:
    """Read the object in a JSON file. Raises `error`, also if it contains a list or a scalar."""
    values = read_json(path, error)
    if not isinstance(values, dict):
        raise error(f"got {json_type(values)}", where=display_path(path), expected="a JSON object")
    return values


def parse_json(
    text: str,
    where: str,
    error: ErrorType = ConfigError,
    *,
    line: int | None = None,
    lone_surrogates: bool = False,
) -> Any:
    """Parse JSON to plain values with finite numbers and no duplicate keys.

    Errors start with `where`, followed by line and column. `line` is the line number in a JSON lines file.
    `lone_surrogates` accepts lone surrogates, so that the caller can report them. Raises `error`.
    """

    def at(position: int, reason: str, fix: str = "") -> MindSpeedMMError:
        number = line if line is not None else text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        return error(f"not valid JSON: {reason}", where=f"{where}:{number}:{column}", fix=fix)

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise at(text.find(digits), f"a number of {len(digits)} digits; expected at most {_MAX_DIGITS}")
        return int(digits)

    def decimal(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise at(text.find(digits), f"{digits[:40]} is too large for a number")
        return value

    def constant(name: str) -> Any:
        raise at(max(text.find(name), 0), f"expected a finite number, got {name}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise at(
                max(text.rfind(json.dumps(twice, ensure_ascii=False)), 0),
                f"key {twice!r} occurs twice",
                "keep one",
            )
        return found

    try:
        values = json.loads(
            text, object_pairs_hook=pairs, parse_int=whole, parse_float=decimal, parse_constant=constant
        )
    except json.JSONDecodeError as problem:
        raise at(problem.pos, problem.msg) from None
    except RecursionError:
        raise at(0, f"nested more than {MAX_DEPTH} deep") from None
    doubtful = (
        text.count("[") + text.count("{") > MAX_DEPTH or re.search(r"\\u[dD][89a-fA-F]", text) is not None
    )
    if doubtful and (reason := plain_problem(values, surrogates=lone_surrogates)):
        raise at(0, reason)
    return values


def json_lines(
    text: str, where: str, error: ErrorType, *, lone_surrogates: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield the line number and value of each line that is not blank.

    Raises `error` at the first line that is not JSON.
    """
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            yield number, parse_json(line, where, error, line=number, lone_surrogates=lone_surrogates)


def format_json(values: Any, *, indent: int | None = None) -> str:
    """Format values as JSON that `parse_json` reads back.

    Keeps non-ASCII characters, but escapes those that other tools treat as line ends.
    """
    text = json.dumps(values, indent=indent, ensure_ascii=False).translate(_LINE_BREAKS)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def json_type(value: Any) -> str:
    """Return JSON's name for the type of `value`, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a string"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


def plain_problem(values: Any, *, surrogates: bool = False) -> str | None:
    """Return why the values cannot be stored as JSON, or None if they can.


    Reasons: too much nesting, a number that is not finite, a lone surrogate, a type that JSON lacks.
    """
    level, depth = [values], 0
    while level:
        if depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} deep"
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                if not surrogates and _SURROGATE.search(value):
                    return (
                        f"{value[:40]!r} has half of a surrogate pair, which no file can hold; write the "
                        "character"
                    )
            elif isinstance(value, float):
                if not math.isfinite(value):
                    return f"expected a finite number, got {value}"
            elif not isinstance(value, (int, type(None))):
                return (
                    f"expected text, numbers, lists and objects, got a {type(value).__name__} ({value!s:.40})"
                )
        level, depth = below, depth + 1
    return None


# Writing


def open_append(path: Path, *, buffering: int = -1) -> BinaryIO:
    """Open a file for appending, and create it if it is missing. Never blocks.

    Raises OSError, also for a FIFO, a device or a socket.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a FIFO without a reader, or a socket
            raise
        raise OSError(errno.EINVAL, "not a regular file") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return os.fdopen(handle, "ab", buffering)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` to write to.

    The file replaces `path` when the block ends, and is removed on an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def write_json(path: Path, values: Any) -> None:
    """Write an indented JSON file atomically. Raises OSError."""
    write_text(path, format_json(values, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON lines file atomically. Raises OSError."""
    write_text(path, "".join(format_json(row) + "\n" for row in rows))
