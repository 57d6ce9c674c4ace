"""Identify a process by its id, machine and container, boot, and start time."""

from __future__ import annotations

import os
import socket
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path


def is_alive(pid: int, start: int = 0) -> bool:
    """Whether process `pid` runs and, unless `start` is 0, has that start time.

    A zombie does not count as running.
    """
    found = process_start(pid)
    if found is None:
        return False
    return start in (0, found) or found == 0


def process_start(pid: int) -> int | None:
    """Clock ticks from the host's start to that of process `pid`.

    0 if it is unknown, None if there is no such process.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in ("Z", "X") else int(fields[18])
    except (OSError, ValueError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


@cache
def machine() -> str:
    """8 hex digits for the host and its process namespace: within one, a process id names one process."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{socket.gethostname()} {space}'.encode()):08x}"


@cache
def boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
