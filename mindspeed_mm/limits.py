"""The cores and host memory that this process may use, within the limits of its container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return the number of cores in the affinity mask, up to the quota of the container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups("cpu"):
        old = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
        quota = _numbers(folder / "cpu.max") or [number for path in old for number in _numbers(path)]
        if len(quota) == 2 and min(quota) > 0:
            cores = min(cores, math.ceil(quota[0] / quota[1]))
    return max(cores, 1)


def free_memory() -> int:
    """Return the bytes of host memory that this process can allocate without swapping, or 0 if unknown."""
    found = [1024 * size for size in _field(_PROC / "meminfo", "MemAvailable:")]
    for limit, folder in _memory_limits():
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes")
        # The page cache counts as used, but is freed when memory is short.
        stat = folder / "memory.stat"
        pages = _field(stat, "total_inactive_file") or _field(stat, "inactive_file") or [0]
        found += [max(0, limit - size + pages[0]) for size in used]
    return min(found, default=0)


def total_memory() -> int:
    """Return the host memory of the machine in bytes, or the limit of the container if it is lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _memory_limits())])


def _memory_limits() -> Iterator[tuple[int, Path]]:
    for folder in _control_groups("memory"):
        for limit in _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes"):
            yield limit, folder


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the control groups of this process, innermost first. The limit of each one applies.

    In a container, the path may be that on the host. The mount itself is then the group of the container.
    """
    for line in _read(_PROC / "self/cgroup").splitlines():
        _, names, path = (line + "::").split(":")[:3]
        if names and controller not in names.split(","):
            continue
        mounts = (_CGROUPS / names, _CGROUPS / controller) if names else (_CGROUPS, _CGROUPS / "unified")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in dict.fromkeys(mounts):
            yield from (mount.joinpath(*parts[:end]) for end in range(len(parts), -1, -1))


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a small kernel file; [] if it is missing or contains `max`."""
    words = _read(path).split()
    return list(map(int, words)) if all(word.removeprefix("-").isdigit() for word in words) else []


def _field(path: Path, name: str) -> list[int]:
    """Return the number after a name in the file, if there is one."""
    rows = (line.split() for line in _read(path).splitlines())
    return [int(row[1]) for row in rows if len(row) > 1 and row[0] == name and row[1].isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
