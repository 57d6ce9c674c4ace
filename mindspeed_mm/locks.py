"""A lock file that lets only one run write to a folder.

The lock file names the host, process and command. The kernel releases its lock when the process ends. On file
systems without such locks, and across machines, the start time of the process and the heartbeat of the file
show whether the holder is running. Reading a folder needs no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mindspeed_mm.errors import LaunchError, printable
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.log import get_logger, rank
from mindspeed_mm.process_ids import boot, is_alive, machine, process_start

logger = get_logger(__name__)
LOCK_FILE = ".mindspeed-mm.lock"
HEARTBEAT = 10.0  # seconds between updates of the file time
PATIENCE = 4.5  # number of heartbeats that a process on another machine may miss
SETTLE = 0.2  # seconds after which processes that took a lock at the same time can read who has it
_MAX_BYTES = 1 << 16  # maximum size of a lock file
_ENDING = 3  # retries while the files of a killed process are being closed, about one second each
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock file describes it."""

    host: str
    machine: str  # host and process namespace, within which a process id is unique
    boot: str  # changes when the host reboots
    pid: int
    start: int  # start of the process in clock ticks since the host booted; 0 = unknown
    since: float  # seconds since the epoch
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        """Return the holder that describes this process."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "python"
        pid = os.getpid()
        return cls(
            socket.gethostname(),
            machine(),
            boot(),
            pid,
            process_start(pid) or 0,
            time.time(),
            command[:2000],
        )

    def describe(self) -> str:
        """Return text such as `train.py … (process 4711 on node-3, since 2026-11-28 13:50:04)`."""
        command, host = printable(self.command, 80), printable(self.host, 64)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{command} (process {self.pid} on {host}, since {since})"

    @property
    def is_local(self) -> bool:
        """Whether the process is on this machine and in this container."""
        return self.machine == machine()

    @property
    def is_alive(self) -> bool:
        """Whether the process is running. Valid only for a local holder."""
        return is_alive(self.pid, self.start) and self.boot == boot()


_FIELDS = {"host": str, "machine": str, "boot": str, "pid": int, "start": int, "since": float, "command": str}


@contextmanager
def lock_folder(folder: Path, *, choose: str) -> Iterator[None]:
    """Hold the lock of `folder` on rank 0. Other ranks continue without it.

    Creates the folder if it is missing, and removes incomplete files of killed runs directly in it. Raises
    LaunchError if another run holds the lock.

    `choose` is the flag or key that sets the folder, for the advice `choose another {choose}`.
    """
    if rank() != 0:
        yield
        return
    made = _make_folders(folder, choose)
    try:
        handle = _take(folder, choose)
        over = threading.Event()
        beat = threading.Thread(target=_beat, args=(handle, over), daemon=True, name="lock heartbeat")
        beat.start()
        try:
            sweep([folder])
            yield
        finally:
            over.set()
            beat.join()
            _release(folder, handle)
    finally:
        for path in made:  # remove them again if they are still empty
            with suppress(OSError):
                path.rmdir()


def check_unlocked(folder: Path, *, choose: str) -> None:
    """Check that no process on this machine holds the lock. Does not take it, and never waits.

    Raises LaunchError.
    """
    if is_in_use(folder) and (holder := read_holder(folder)) is not None:
        raise _refusal(folder, holder, choose)


def is_in_use(folder: Path) -> bool:
    """Return whether another running process on this machine holds the lock of `folder`."""
    holder = read_holder(folder)
    return holder is not None and holder.is_local and holder.is_alive and holder.pid != os.getpid()


def read_holder(folder: Path) -> Holder | None:
    """Return the holder that the lock file of `folder` names, or None if there is no valid lock file."""
    try:
        handle = _open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _parse(os.pread(handle, _MAX_BYTES, 0))
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)


def _open(path: Path, flags: int) -> int:
    """Open the lock file without blocking. Raises OSError, also for a FIFO or a folder."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return handle


def _take(folder: Path, choose: str) -> int:
    """Open, lock and write the lock file, and return its descriptor. Raises LaunchError."""
    path = folder / LOCK_FILE
    while True:
        try:
            handle = _open(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise _cannot_write(path, error, choose) from None
        try:
            locked = _try_lock(handle)
            if not _is_at(handle, path):  # the holder ended and removed the file
                os.close(handle)
                continue
            before = _holder_in(handle, written=locked is False)
            # The threads of a killed process may keep its files open for a moment after it ends.
            for _ in range(_ENDING):
                if locked is not False or before is not None:
                    break
                locked = _try_lock(handle)
                before = _holder_in(handle, written=locked is False)
            if _is_held(handle, before, locked):
                raise _refusal(folder, before, choose)
            _write(handle, Holder.this_process(), settle=locked is None)
            after = _holder_in(handle, written=True)
            if after is None or (after.machine, after.pid) != (machine(), os.getpid()):
                raise _refusal(folder, after, choose)
        except LaunchError:
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            raise _cannot_write(path, error, choose) from None
        if before is not None:
            logger.info(f"{folder}: took over from {before.describe()}, which did not end by itself")
        return handle


def _cannot_write(path: Path, error: OSError, choose: str) -> LaunchError:
    reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
    fix = f"remove it, or choose another {choose}" if os.path.lexists(path) else f"choose another {choose}"
    return LaunchError(f"cannot be written: {reason}", where=path, fix=fix)


def _try_lock(handle: int) -> bool | None:
    """Try to take the kernel's lock. Returns whether it succeeded, or None if the file system has no locks.

    Uses a record lock, because child processes inherit a flock, so a reader that outlives its killed parent
    would keep the folder locked.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is_held(handle: int, holder: Holder | None, locked: bool | None) -> bool:
    """Return whether the holder of the lock is still running. `locked` is the result of `_try_lock`."""
    if locked is False:
        return True
    if holder is None:
        return False
    if holder.is_local:
        return holder.is_alive
    # The holder is in another container on the same kernel, which would know of its lock.
    if locked and holder.boot == boot() and holder.boot:
        return False
    logger.info(f"waiting {HEARTBEAT * PATIENCE:.0f} s for a heartbeat of {holder.describe()}")
    return _beats(handle)


def _beats(handle: int) -> bool:
    """Wait for a heartbeat of the lock file. Never compares times of different clocks."""
    before, end = os.fstat(handle).st_mtime_ns, time.monotonic() + HEARTBEAT * PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, HEARTBEAT / 5))
        if os.fstat(handle).st_mtime_ns != before:
            return True
    return False


def _beat(handle: int, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(handle)


def _holder_in(handle: int, *, written: bool) -> Holder | None:
    """Return the holder in an open lock file. If `written`, it is locked, so wait briefly for the name."""
    for _ in range(10):
        with suppress(ValueError):
            found = _parse(os.pread(handle, _MAX_BYTES, 0))
            is_ended = found is not None and found.is_local and not found.is_alive
            if not written or (found is not None and not is_ended):
                return found
        time.sleep(SETTLE / 2)
    return None


def _write(handle: int, holder: Holder, *, settle: bool) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(asdict(holder), indent=2) + "\n").encode(), 0)
    os.fsync(handle)
    if settle:
        time.sleep(SETTLE)


def _parse(text: bytes) -> Holder | None:
    """Parse a lock file. Returns None if it is empty. Raises ValueError if it is incomplete."""
    if not text.strip(b"\0 \n"):
        return None
    try:
        read = json.loads(text)
        found = Holder(**{name: kind(read[name]) for name, kind in _FIELDS.items()})
        time.localtime(found.since)
    except (LookupError, TypeError, OverflowError, OSError, RecursionError) as error:
        raise ValueError("not a lock file") from error
    return found


def _release(folder: Path, handle: int) -> None:
    path = folder / LOCK_FILE
    with suppress(OSError):
        if _is_at(handle, path):  # remove before unlocking, so that nobody locks a file that disappears
            path.unlink()
    os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _refusal(folder: Path, holder: Holder | None, choose: str) -> LaunchError:
    who = "another run" if holder is None else holder.describe()
    fix = f"wait until it ends, stop it, or choose another {choose}"
    if holder is not None and not holder.is_local:
        fix += f"; if it has certainly ended, remove {folder / LOCK_FILE}"
    return LaunchError(f"in use by {who}", where=folder, fix=fix)


def _make_folders(folder: Path, choose: str) -> list[Path]:
    """Create `folder`, and return the folders that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"cannot be created: {error.strerror}", where=folder, fix=f"choose another {choose}"
        ) from None
    return missing
