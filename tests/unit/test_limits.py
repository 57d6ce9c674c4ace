"""Cores and memory of a container: the control groups of both versions, and machines without any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mindspeed_mm import limits
from mindspeed_mm.limits import free_memory, total_memory, usable_cores

GIB = 1 << 30
FREE_MACHINE = f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores with 32 GiB free and no control groups; files of the test's add them."""
    monkeypatch.setattr(limits, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    write(tmp_path / "proc/meminfo", FREE_MACHINE)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_machine_without_control_groups_counts_all(kernel: Path) -> None:
    assert usable_cores() == 64
    assert free_memory() == 32 * GIB
    assert total_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("path", ["/", "/kubepods/pod1/abc", "/../../init.scope"])
def test_limits_of_a_container_hold(kernel: Path, path: str) -> None:
    """Of version 2, mounted alone; the path is often the host's, which the container does not see."""
    write(kernel / "proc/self/cgroup", f"0::{path}\n")
    write(kernel / "cgroup/cpu.max", "250000 100000\n")
    write(kernel / "cgroup/memory.max", f"{GIB}\n")
    write(kernel / "cgroup/memory.current", f"{GIB - 300}\n")
    write(kernel / "cgroup/memory.stat", "anon 5\ninactive_file 200\n")
    assert usable_cores() == 3
    assert free_memory() == 500, "what files fill can be given back"
    assert total_memory() == GIB


def test_outer_group_limits_the_inner_one(kernel: Path) -> None:
    write(kernel / "proc/self/cgroup", "0::/slurm/step\n")
    for folder, cpu, memory in (("slurm", "400000 100000", 2 * GIB), ("slurm/step", "max 100000", "max")):
        write(kernel / f"cgroup/{folder}/cpu.max", cpu)
        write(kernel / f"cgroup/{folder}/memory.max", str(memory))
        write(kernel / f"cgroup/{folder}/memory.current", str(GIB))
    assert usable_cores() == 4
    assert free_memory() == GIB
    write(kernel / "cgroup/slurm/step/cpu.max", "50000 100000")
    assert usable_cores() == 1


def test_limits_of_version_1_hold(kernel: Path) -> None:
    groups = "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n1:name=systemd:/docker/a\n0::/\n"
    write(kernel / "proc/self/cgroup", groups)
    write(kernel / "cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us", "200000")
    write(kernel / "cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us", "100000")
    write(kernel / "cgroup/memory/docker/a/memory.limit_in_bytes", str(3 * GIB))
    write(kernel / "cgroup/memory/docker/a/memory.usage_in_bytes", str(GIB))
    write(kernel / "cgroup/memory/docker/a/memory.stat", "inactive_file 1\ntotal_inactive_file 4096\n")
    assert usable_cores() == 2
    assert free_memory() == 2 * GIB + 4096


def test_groups_without_a_limit_change_nothing(kernel: Path) -> None:
    write(kernel / "proc/self/cgroup", "4:memory:/\n1:cpu:/\n0::/\nnonsense\n")
    write(kernel / "cgroup/cpu/cpu.cfs_quota_us", "-1")
    write(kernel / "cgroup/cpu/cpu.cfs_period_us", "100000")
    write(kernel / "cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    write(kernel / "cgroup/memory/memory.usage_in_bytes", "4096")
    assert usable_cores() == 64
    assert free_memory() == 32 * GIB


def test_system_without_numbers_says_0(kernel: Path) -> None:
    (kernel / "proc/meminfo").unlink()
    assert free_memory() == 0
