"""The `vace doctor` checks that do not need torch: packages, limits, memory, clock, disks and video."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np

from mindspeed_mm.limits import free_memory, usable_cores
from mindspeed_mm.tools.doctor import Finding

DISTRIBUTION = "mindspeed-mm-vace"
SHOWN = ("torch", "torch_npu", "megatron-core", "diffusers", "transformers", "av")
FILES = 4096  # minimum file descriptors, for weight shards, data workers and sockets
SHARED = 1 << 30  # minimum bytes of /dev/shm, through which data workers pass batches
FREE = 20 << 30  # minimum free bytes on a disk, for checkpoints
PROBE = 64 << 20  # bytes that the speed test writes and reads
SLOW = 100.0  # disk speed in MB/s below which a warning is given
OFF = 2.0  # maximum clock difference in seconds
MEMORY = 8 << 30  # minimum available bytes of host memory


def check_packages() -> Iterator[Finding]:
    """Report the versions of Python and of the main packages, and check the requirements."""
    from packaging.requirements import Requirement

    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        lines = []
    wrong = []
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _version(wanted.name)
        if found is None:
            wrong.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} is {found}, expected {wanted.specifier}")
    known = [f"{name} {found}" for name in SHOWN if (found := _version(name))]
    text = f"Python {platform.python_version()}, {', '.join(known)}"
    if wrong:
        yield Finding("packages", "broken", f"{text}; {'; '.join(wrong)}", "pip install -c constraints.txt .")
    else:
        yield Finding("packages", "ok", text)


def check_limits() -> Iterator[Finding]:
    """Check the limit of open files and the free shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = ""
    if soft < FILES and (hard == resource.RLIM_INFINITY or hard >= FILES):
        fix = f"ulimit -n {FILES}"
    elif soft < FILES:  # only an administrator can raise the hard limit
        fix = f"ask an administrator to raise nofile to {FILES} in /etc/security/limits.conf"
        fix += f", and until then: ulimit -n {hard}" if soft < hard else ""
    yield Finding("open files", "warn" if fix else "ok", f"{soft} at once (ulimit -n)", fix)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        fix = (
            "start the container with --shm-size=16g, or train with --num-workers 0" if free < SHARED else ""
        )
        yield Finding("shared memory", "warn" if fix else "ok", f"{_size(free)} free in /dev/shm", fix)


def check_memory() -> Iterator[Finding]:
    """Check the available memory, within the limit of the control group, and report the usable cores."""
    available = free_memory()
    if available:
        fix = "close other programs, or use fewer workers and processes" if available < MEMORY else ""
        yield Finding("memory", "warn" if fix else "ok", f"{_size(available)} available", fix)
    threads = os.environ.get("OMP_NUM_THREADS")
    threads_note = f", OMP_NUM_THREADS {threads}" if threads else ""
    yield Finding("cores", "ok", f"{usable_cores()}{threads_note}")


def check_clock(folder: Path) -> Iterator[Finding]:
    """Compare this machine's clock with that of the folder's disk, because file times are compared."""
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".vace-doctor-")  # noqa: SIM115 (closed below)
    except OSError as error:
        found = f"{folder} cannot be written to: {error.strerror}"
        yield Finding("clock", "broken", found, "set --out to a writable folder")
        return
    with file:
        before = time.time()
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        written, after = os.stat(file.name).st_mtime, time.time()
    off = max(before - written, written - after, 0.0)
    fix = "synchronize the clocks of this machine and of the file server (ntp, chrony)" if off > OFF else ""
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(after))
    yield Finding("clock", "warn" if fix else "ok", f"{now}, {off:.1f} s from the disk's", fix)


def check_space(folder: Path) -> Iterator[Finding]:
    """Check the free space where a run writes."""
    free = shutil.disk_usage(folder).free
    fix = "free disk space, or write to another disk" if free < FREE else ""
    yield Finding("disk", "warn" if fix else "ok", f"{_size(free)} free for {folder}", fix)


def check_speed(folder: Path) -> Iterator[Finding]:
    """Measure the write and read speed of the folder's disk, bypassing the page cache if possible."""
    block = np.random.default_rng(0).bytes(1 << 20)
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed below)
    except OSError as error:
        found = f"{folder} cannot be written to: {error.strerror}; its speed is not measured"
        yield Finding("data", "warn", found, "set --data to a writable folder on that disk")
        return
    with file:
        start = time.perf_counter()
        for _ in range(PROBE // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - start
    writes, reads = (PROBE / max(seconds, 1e-9) / 1e6 for seconds in (written, read))
    fix = "copy clips and features to a local disk" if reads < SLOW else ""
    text = f"{folder}: writes {writes:.0f} MB/s, reads {reads:.0f} MB/s"
    yield Finding("data", "warn" if fix else "ok", text, fix)


def check_video() -> Iterator[Finding]:
    """Write a few frames to an mp4 and read them back."""
    from mindspeed_mm.data.video import open_video
    from mindspeed_mm.data.video_writer import write_video

    frames = np.full((5, 32, 32, 3), 90, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        found = open_video(write_video(Path(folder) / "a.mp4", frames, 16))
        back = found.read(range(found.num_frames))
    same = back.shape == frames.shape and int(np.abs(back.astype(int) - frames).max()) < 8
    fix = "" if same else "pip install --force-reinstall av"
    yield Finding("video", "ok" if same else "broken", "H.264 written and read back", fix)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
