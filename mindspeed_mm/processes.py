"""How a process stops: on a signal, with its parent, or because a read does not come back.

`handling_signals` makes SIGINT, SIGTERM and SIGHUP alike: outside `deferred` they raise `Stopped` in the main
thread, inside it they are only noted, and the code stops where it is whole. A second Ctrl-C ends the process
at once.
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
# of the launcher's ranks: the socket that rank 0 serves the rendezvous on; empty for the others
STORE = "MINDSPEED_MM_STORE"
GRACE = "MINDSPEED_MM_GRACE"  # seconds that a read may last after a signal
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# All processes of a run are gone within ten seconds. One may stop only after another has.
_UNWIND = 4.0  # seconds for the main thread to leave C code, where nothing is to be finished
_EXIT = 3.0  # seconds for the interpreter to clean up
_TICK = 0.25  # seconds between looks at a process that is stopping
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """A signal stopped the command. `said`: the user has read why.

    Not an Exception, so that no handler of errors takes it.
    """

    def __init__(self, number: int, *, said: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.said = number, said

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that this signal ended: 130, 143 or 129."""
        return 128 + self.number


@dataclass
class _State:
    """What this process knows of its own end."""

    installed: bool = False
    signal: int = 0  # the first stop signal that the main thread took; 0 = none
    exit_code: int = 0  # of a command that a signal has stopped; 0 = none has
    forked_by_main: bool = True  # whether the main thread of the parent forked this process
    deferred: int = 0  # how many `deferred` blocks the main thread is in
    reading: dict[int, tuple[object, float]] = field(
        default_factory=dict
    )  # thread → what it reads, since when


_STATE = _State()
_FORK_HOOK: list[bool] = []  # a hook cannot be taken back: it is registered once


def stop_signal() -> int:
    """The signal that asks this process to stop; 0 when none came."""
    return _STATE.signal


def check_stop() -> None:
    """Raises Stopped when a signal was noted in a `deferred` block."""
    if _STATE.signal:
        raise Stopped(_STATE.signal)


@contextmanager
def deferred() -> Iterator[None]:
    """Note a signal, do not raise: a unit of work ends first, or files change places.

    Ask `stop_signal` afterwards.
    """
    _STATE.deferred += 1
    try:
        yield
    finally:
        _STATE.deferred -= 1


@contextmanager
def reading(name: object) -> Iterator[None]:
    """What this thread reads: named when it does not come back after a signal."""
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
    """Stop signals raise `Stopped` or are noted, and a thread ends a process that does not stop.

    Nested: the outer one counts.

    A signal that was ignored at the start stays ignored: `nohup` and background jobs of scripts mean it.
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
        atexit.register(_leave)  # the first that is registered is the last to run
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
    """Kill what this command forked.

    The interpreter would send SIGTERM, which helpers leave to us, and wait.
    """
    left = _helpers() - known
    if not left:
        return
    heard = signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # torch's handler reports a worker that a signal ended
    for helper in left:
        helper.kill()
    for helper in left:
        helper.join(2)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if heard is None else heard)


def _on_signal(number: int, _: FrameType | None) -> None:
    if _STATE.signal:
        if number == signal.SIGINT and not is_rank():  # a launcher decides for its ranks
            die_of(signal.SIGINT)
        return
    _STATE.signal = number
    atexit.register(_limit_exit, 128 + number)
    if not _STATE.deferred:
        raise Stopped(number)


def die_of(number: int) -> None:
    """End as a process that the signal killed, so that a shell ends its loop, too. Does not return."""
    _flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the signal is blocked


def die_at_exit(number: int) -> None:
    """End by Ctrl-C itself once threads have ended.

    By other signals, and in ranks of a launcher, end with the exit code.
    """
    if number == signal.SIGINT and not is_rank():
        atexit.register(die_of, number)
    else:
        _STATE.exit_code = 128 + number


def _leave() -> None:
    """Spare a stopped process the interpreter's teardown, after all other exit handlers.

    Collecting torch's objects takes a second of CPU.
    """
    if _STATE.exit_code:
        _flush()
        os._exit(_STATE.exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _limit_exit(code: int) -> None:
    """A helper that hangs in a read must not keep a stopped process from its end."""
    timer = threading.Timer(_EXIT, os._exit, (code,))
    timer.daemon = True
    timer.start()


def is_rank() -> bool:
    """Whether a launcher or torchrun started this process, or its parent."""
    return LAUNCHER in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def grace() -> float:
    """Seconds that a read may last after a signal: MINDSPEED_MM_GRACE, 60 by default."""
    try:
        return max(0.0, float(os.environ.get(GRACE, "60")))
    except ValueError:
        return 60.0


def _parent_to_watch() -> int:
    """The process whose end is ours: launcher or torchrun.

    0 for a command that a user started: it may outlive its shell.
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
    """Let Linux kill this process when the thread that started it ends; elsewhere a thread watches."""
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
    """In a process that works for its parent: leave signals to the parent, and end with it.

    Forked ones do so by themselves.
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
    """The thread that sees a signal, or the end of the parent, while the main thread is in C code."""
    first, since = 0, 0.0
    poll = select.poll()  # select() takes no descriptor above 1023
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
            time.sleep(0.05)  # a closed pipe stays readable
    os.close(wake)


def _end_what_hangs(number: int, since: float) -> None:
    now, name = time.monotonic(), signal.Signals(number).name
    slow = [what for what, start in _STATE.reading.values() if now - max(start, since) >= grace()]
    if slow:
        _give_up(
            f"DataError: still reading {slow[0]} {now - since:.0f} s after {name}; stopping without it", 1
        )
    if not _STATE.deferred:
        limit = grace() if _STATE.signal else _UNWIND  # the main thread cleans up, or did not even hear of it
        if now - since >= limit:
            what = next(iter(_STATE.reading.values()), ("", 0.0))[0]
            _give_up(f"stopped by {name}" + (f" while reading {what}" if what else ""), 128 + number)


def _give_up(text: str, code: int) -> None:
    where = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    with suppress(OSError):
        os.write(2, f"{where}{text}\n".encode())
    os._exit(code)
