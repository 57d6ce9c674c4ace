"""Rank-aware logging, and the conversion of errors to one line and an exit code."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TextIO, TypeVar

from mindspeed_mm.errors import ConfigError, LaunchError, MindSpeedMMError, printable, sentence_of
from mindspeed_mm.processes import LAUNCHER, Stopped, die_at_exit, handling_signals

_LONGEST = 4000  # maximum characters of a log line
_MAX_DIGITS = 9  # maximum digits of a rank
P = ParamSpec("P")
R = TypeVar("R")
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the file that torchrun reads to report the first failing rank


def rank() -> int:
    """Return the global rank from torchrun's environment, or 0 outside torchrun. Raises LaunchError."""
    return launch_number("RANK", 0)


def local_rank() -> int:
    """Return the rank on this machine from torchrun's environment, or 0 outside torchrun.

    Raises LaunchError.
    """
    return launch_number("LOCAL_RANK", 0)


def world_size() -> int:
    """Return the number of processes that torchrun started, or 1 outside torchrun. Raises LaunchError."""
    return launch_number("WORLD_SIZE", 1)


def launch_number(name: str, minimum: int) -> int:
    """Return a number from torchrun's environment, or `minimum` outside torchrun.

    Raises LaunchError for a value below `minimum`.
    """
    text = os.environ.get(name, str(minimum))
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS and int(text) >= minimum):
        raise LaunchError(
            f"got {text!r:.40} in the environment",
            where=name,
            expected=f"a whole number, at minimum {minimum}",
            fix="unset it, or start with torchrun",
        )
    return int(text)


def setup_logging() -> None:
    """Log plain lines to stdout.

    Rank 0 logs everything. The other ranks log warnings and records marked with `on_every_rank`.
    """
    handler = _Stdout(sys.stdout)
    handler.setFormatter(_Lines("%(message)s"))
    handler.addFilter(_is_logged_here)
    handler.addFilter(_Once())
    root = logging.getLogger("mindspeed_mm")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _Stdout(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler for stdout. A closed pipe, as with `| head`, ends the output but not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)  # because Python flushes stdout again at exit
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


class _Lines(logging.Formatter):
    """Formats notes, which may have several lines, and warnings, which are one line.

    Escapes control characters in both, because they may quote a file.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING and not record.exc_info:
            return sentence_of(text, _LONGEST)
        return "\n".join(printable(line, _LONGEST) for line in text.split("\n"))


def get_logger(name: str) -> logging.Logger:
    """Return a logger under `mindspeed_mm`, also for callers in other packages."""
    return logging.getLogger(name if name.startswith("mindspeed_mm") else f"mindspeed_mm.{name}")


def is_logging_rank() -> bool:
    """Return whether this is the last rank, which writes the log line and the metrics, as in Megatron."""
    return rank() == world_size() - 1


def on_every_rank() -> dict[str, bool]:
    """Return the `extra` of a record that every rank logs: `logger.info(text, extra=on_every_rank())`.

    Used for Megatron's log line, which comes from the last rank.
    """
    return {"every_rank": True}


def once() -> dict[str, bool]:
    """Return the `extra` of a record whose text is logged only once. Warnings always behave this way."""
    return {"once": True}


class _Once(logging.Filter):
    """Drops warnings, and records marked with `once`, whose text was logged before."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING and not getattr(record, "once", False):
            return True
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new


def _is_logged_here(record: logging.LogRecord) -> bool:
    return rank() == 0 or record.levelno >= logging.WARNING or getattr(record, "every_rank", False)


def one_line_errors(main: Callable[P, R]) -> Callable[P, R]:
    """Make a command's `main` end with one line on stderr instead of a traceback.

    The exit code is 1 for bad input, and 128 plus the signal number after a signal.

    Set MINDSPEED_MM_TRACEBACK=1 to see where an error was raised.
    """

    @functools.wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        setup_logging()
        with handling_signals():
            try:
                return report_errors(*args, **kwargs)
            except Stopped as stopped:
                if not stopped.logged and os.environ.get("RANK", "0") == "0":
                    sys.stderr.write(f"stopped by {stopped}; no partial files are left\n")
                    sys.stderr.flush()
                die_at_exit(stopped.number)
                raise SystemExit(stopped.exit_code) from None

    def report_errors(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except (MindSpeedMMError, OSError) as raised:
            error = raised if isinstance(raised, MindSpeedMMError) else _of_a_path(raised)
            if error is None or os.environ.get("MINDSPEED_MM_TRACEBACK") == "1":
                raise
            line = f"{type(error).__name__}: {error}"
            # The ranks of a machine usually fail in the same way, so under torchrun only the first prints,
            # and torchrun reports the rest. LOCAL_RANK is compared as text, because it may be invalid.
            if not _leave_to_torchrun(line) or os.environ.get("LOCAL_RANK", "0") == "0":
                where = f"[rank {os.environ['RANK'][:_MAX_DIGITS]}] " if "RANK" in os.environ else ""
                sys.stderr.write(f"{where}{line}\n")
                sys.stderr.flush()
            raise SystemExit(1) from None

    return command


def _of_a_path(error: OSError) -> ConfigError | None:
    """Convert an OSError about a path, which no reader has explained, to an error of one line.

    Returns None for any other OSError.
    """
    if not isinstance(error.filename, str | bytes):
        return None
    return ConfigError(error.strerror or type(error).__name__, where=os.fsdecode(error.filename))


def _leave_to_torchrun(line: str) -> bool:
    """Write torchrun's error file in the format of torch's `@record`. Returns False if there is none."""
    if LAUNCHER in os.environ or not os.environ.get(_ERROR_FILE):
        return False
    extra = {"timestamp": str(int(time.time()))}  # without `py_callstack`, torchrun reports the message
    try:
        with open(os.environ[_ERROR_FILE], "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
    except OSError:
        return False
    return True


def log_table(rows: Sequence[tuple[str, str]]) -> None:
    """Log the summary of a run before it starts: one line `name text` for each row."""
    width = max(12, *(len(name) + 1 for name, _ in rows))
    for name, text in rows:
        get_logger(__name__).info(f"{name:<{width}}{text}")


def terminal() -> TextIO | None:
    """Return the stream on which a progress bar can be drawn, or None.

    This is stderr, or the terminal that a script names if its stderr is a pipe.
    """
    if sys.stderr.isatty():
        return sys.stderr
    try:
        # It must not become the controlling terminal, or Ctrl-C would reach only this process.
        found = os.open(os.environ["MINDSPEED_MM_TERMINAL"], os.O_WRONLY | os.O_NOCTTY)
    except (KeyError, OSError):
        return None
    return os.fdopen(found, "w", encoding="utf-8")
