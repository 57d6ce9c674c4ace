"""Identifies a process by its id, machine and container, boot, and start time."""

from __future__ import annotations

import os
import socket
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path


def is_alive(pid: int, start: int = 0) -> bool:
    """Return whether process `pid` is running and, unless `start` is 0, has that start time.

    A zombie is not running.
    """
    found = process_start(pid)
    if found is None:
        return False
    return start in (0, found) or found == 0


def process_start(pid: int) -> int | None:
    """Return the start of process `pid` in clock ticks since the host booted.

    Returns 0 if it is unknown, and None if there is no such process.
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
    """Return 8 hex digits for the host and the process namespace, within which a process id is unique."""
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
