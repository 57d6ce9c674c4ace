"""Stops a process on a signal, with its parent, or if a read hangs.

`handling_signals` handles SIGINT, SIGTERM and SIGHUP in the same way. Outside `deferred`, they raise
`Stopped` in the main thread. Inside it, they are only recorded, and the code stops where its state is
consistent. A second Ctrl-C ends the process immediately.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from types import FrameType

LAUNCHER = "MINDSPEED_MM_LAUNCHER"  # process id of the launcher, in the environment of its ranks
# Set by the launcher to the socket on which rank 0 serves the rendezvous; empty for the other ranks.
STORE = "MINDSPEED_MM_STORE"
GRACE = "MINDSPEED_MM_GRACE"  # seconds that a read may take after a signal
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# With these limits, all processes of a run end within ten seconds, although some wait for others.
_UNWIND = 4.0  # seconds for the main thread to leave C code if it has nothing to finish
_EXIT = 3.0  # seconds for the interpreter to clean up
_TICK = 0.25  # seconds between checks of a process that is stopping
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal stopped the command. `logged` means that the reason has been logged.

    It is not an Exception, so that no error handler catches it.
    """

    def __init__(self, number: int, *, logged: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.logged = number, logged

    @property
    def exit_code(self) -> int:
        """The exit code that a shell reports for a process ended by this signal: 130, 143 or 129."""
        return 128 + self.number


@dataclass
class _State:
    """The state of this process that is needed to stop it."""

    installed: bool = False
    signal: int = 0  # the first stop signal that the main thread received; 0 = none
    exit_code: int = 0  # exit code of a command stopped by a signal; 0 = not stopped
    forked_by_main: bool = True  # whether the main thread of the parent forked this process
    deferred: int = 0  # depth of nested `deferred` blocks in the main thread
    reading: dict[int, tuple[object, float]] = field(default_factory=dict)  # thread → what, since when


_STATE = _State()
_FORK_HOOK: list[bool] = []  # an exit hook cannot be removed, so it is registered once


def stop_signal() -> int:
    """Return the stop signal that this process received, or 0."""
    return _STATE.signal


def check_stop() -> None:
    """Raise Stopped if a signal arrived in a `deferred` block."""
    if _STATE.signal:
        raise Stopped(_STATE.signal)


@contextmanager
def deferred() -> Iterator[None]:
    """Record a signal instead of raising, so that a unit of work, such as renaming files, completes.

    Check `stop_signal` afterwards.
    """
    _STATE.deferred += 1
    try:
        yield
    finally:
        _STATE.deferred -= 1


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Register what this thread reads, for the error if the read hangs after a signal."""
    thread = threading.get_ident()
    before = _STATE.reading.get(thread)
    _STATE.reading[thread] = (name, time.monotonic())
    try:
        yield
    finally:
        if before is None:
            _STATE.reading.pop(thread, None)
        else:
            _STATE.reading[thread] = before


@contextmanager
def handling_signals() -> Iterator[None]:
    """Make stop signals raise `Stopped` or be recorded, and end a process that does not stop.

    Nested uses have no effect.

    A signal that was ignored at the start stays ignored, as `nohup` and background jobs require.
    """
    if _STATE.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    _STATE.installed, _STATE.signal = True, 0
    known = _helpers()
    if not _FORK_HOOK:
        os.register_at_fork(
            before=_before_fork, after_in_child=lambda: become_helper() if _STATE.installed else None
        )
        atexit.register(_leave)  # exit handlers run in reverse order, so this one runs last
        _FORK_HOOK.append(True)
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    over = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(wake, over, _parent_to_watch()), daemon=True, name="processes"
    )
    watch.start()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        _end_helpers(known)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        over.set()
        os.close(woken)
        _STATE.installed, _STATE.signal = False, 0


def _helpers() -> set[BaseProcess]:
    return set(multiprocessing.active_children()) if "multiprocessing.util" in sys.modules else set()


def _end_helpers(known: set[BaseProcess]) -> None:
    """Kill the processes that this command forked.

    The interpreter would send SIGTERM, which helpers ignore, and then wait for them.
    """
    left = _helpers() - known
    if not left:
        return
    # torch's handler would report a worker that a signal ended.
    heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for helper in left:
        helper.kill()
    for helper in left:
        helper.join(2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if heard is None else heard)


def _on_signal(number: int, _: FrameType | None) -> None:
    if _STATE.signal:
        if number == signal.SIGINT and not is_rank():  # a launcher decides for its ranks
            exit_by_signal(signal.SIGINT)
        return
    _STATE.signal = number
    atexit.register(_limit_exit, 128 + number)
    if not _STATE.deferred:
        raise Stopped(number)


def exit_by_signal(number: int) -> None:
    """End like a process killed by the signal, so that a shell loop ends, too. Does not return."""
    _flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # reached only if the signal is blocked


def die_at_exit(number: int) -> None:
    """At exit, after threads have ended, end by SIGINT itself if the signal was Ctrl-C.

    After other signals, and in ranks of a launcher, end with the exit code.
    """
    if number == signal.SIGINT and not is_rank():
        atexit.register(exit_by_signal, number)
    else:
        _STATE.exit_code = 128 + number


def _leave() -> None:
    """Skip the interpreter's teardown of a stopped process, after all other exit handlers.

    Tearing down torch's objects takes a second of CPU time.
    """
    if _STATE.exit_code:
        _flush()
        os._exit(_STATE.exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _limit_exit(code: int) -> None:
    """End the process after a time limit, so that a helper with a hanging read cannot keep it alive."""
    timer = threading.Timer(_EXIT, os._exit, (code,))
    timer.daemon = True
    timer.start()


def is_rank() -> bool:
    """Return whether a launcher or torchrun started this process or its parent."""
    return LAUNCHER in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def grace() -> float:
    """Return how many seconds a read may take after a signal: MINDSPEED_MM_GRACE, 60 by default."""
    try:
        return max(0.0, float(os.environ.get(GRACE, "60")))
    except ValueError:
        return 60.0


def _parent_to_watch() -> int:
    """Return the process id of the launcher or torchrun, with which this process must end.

    Returns 0 for a command that a user started, because it may outlive its shell.
    """
    parent = os.getppid()
    if LAUNCHER in os.environ and os.environ[LAUNCHER] != str(parent):
        if not _is_alive(os.environ[LAUNCHER]):
            os._exit(1)
        return 0
    if not is_rank():
        return 0
    _die_with(parent)
    return parent


def _die_with(parent: int) -> None:
    """Make Linux kill this process when its parent thread ends. Other systems rely on polling the parent."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _before_fork() -> None:
    _STATE.forked_by_main = threading.current_thread() is threading.main_thread()


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def become_helper() -> None:
    """Set up a process that works for its parent: ignore signals, and end with the parent.

    Forked processes do this automatically.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _STATE.installed, _STATE.signal, _STATE.deferred = False, 0, 0
    _STATE.reading.clear()
    parent = os.getppid()
    if _STATE.forked_by_main:
        _die_with(parent)
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="parent watch").start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _watch(wake: int, over: threading.Event, parent: int) -> None:
    """Watch for a signal or the end of the parent, in a thread, because the main thread may be in C code."""
    first, since = 0, 0.0
    poll = select.poll()  # not select(), which accepts no descriptor above 1023
    poll.register(wake, select.POLLIN)
    while not over.is_set():
        arrived = poll.poll(1000 * (_TICK if first else 1))
        if parent and os.getppid() != parent:
            os._exit(1)
        if arrived:
            with suppress(BlockingIOError):
                numbers = [number for number in os.read(wake, 64) if number in STOP_SIGNALS]
                if numbers and not first:
                    first, since = numbers[0], time.monotonic()
        if first:
            _end_what_hangs(first, since)
        if arrived:
            time.sleep(0.05)  # because a closed pipe stays readable
    os.close(wake)


def _end_what_hangs(number: int, since: float) -> None:
    now, name = time.monotonic(), signal.Signals(number).name
    slow = [what for what, start in _STATE.reading.values() if now - max(start, since) >= grace()]
    if slow:
        _give_up(
            f"DataError: still reading {slow[0]} {now - since:.0f} s after {name}; stopping without it", 1
        )
    if not _STATE.deferred:
        limit = grace() if _STATE.signal else _UNWIND  # cleaning up, or in C code since before the signal
        if now - since >= limit:
            what = next(iter(_STATE.reading.values()), ("", 0.0))[0]
            _give_up(f"stopped by {name}" + (f" while reading {what}" if what else ""), 128 + number)


def _give_up(text: str, code: int) -> None:
    where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    with suppress(OSError):
        os.write(2, f"{where}{text}\n".encode())
    os._exit(code)
