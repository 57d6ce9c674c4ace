"""Temporary names for files that are being written, and removal of those that killed runs left behind."""

from __future__ import annotations

import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from mindspeed_mm.log import get_logger
from mindspeed_mm.process_ids import is_alive, machine, process_start

logger = get_logger(__name__)
FOREIGN_AGE = 3600.0  # seconds after which another machine's temporary file is considered abandoned
NAME_BYTES = 255  # maximum length of a file name
_TEMPORARY = re.compile(r"\..+\.(\d+)-(\d+)-([0-9a-f]{8})\.tmp")
_FORMER = re.compile(r"\..+\.(\d+)\.tmp")  # names that earlier versions used


def temporary_name(name: str) -> str:
    """Return the temporary name under which this process writes `name`.

    It is `.NAME.PID-START-MACHINE.tmp`, of at most 255 bytes.
    """
    pid = os.getpid()
    tail = f".{pid}-{process_start(pid) or 0}-{machine()}.tmp"
    data = os.fsencode(name)
    if len(data) + len(tail) + 1 > NAME_BYTES:  # shorten it; the checksum keeps it unique
        kept = os.fsdecode(data[: NAME_BYTES - len(tail) - 10]).encode("utf-8", "ignore").decode()
        name = f"{kept}{zlib.crc32(data):08x}"
    return f".{name}{tail}"


def sweep(folders: Iterable[Path], *, more: Callable[[Path], bool] = lambda path: False) -> int:
    """Remove what killed runs left directly in `folders`, and return the number of files and folders.

    The caller must hold the lock. Removes the temporary files of processes that have ended, and hidden paths
    that `more` accepts. Logs one line.
    """
    removed: list[Path] = []
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            removed += [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(".") and (is_abandoned(Path(entry.path)) or more(Path(entry.path)))
            ]
    removed = [path for path in removed if _remove(path)]
    if removed:
        where = ", ".join(dict.fromkeys(str(path.parent) for path in removed[:3]))
        logger.info(f"{where}: removed {len(removed)} temporary file(s) of a run that was killed")
    return len(removed)


def is_abandoned(path: Path) -> bool:
    """Return whether `path` is a temporary file of a process that has ended.

    A file of another machine is considered abandoned after an hour without changes.
    """
    if match := _TEMPORARY.fullmatch(path.name):
        if match[3] == machine():
            return not is_alive(int(match[1]), int(match[2]))
    elif not (match := _FORMER.fullmatch(path.name)) or is_alive(int(match[1])):
        return False
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime > FOREIGN_AGE
    return False


def _remove(path: Path) -> bool:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        return False
    return True
