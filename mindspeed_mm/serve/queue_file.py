"""The file of a queue: its tables, checked on opening, and its rows as Jobs.

Does not import torch.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.serve.problem import ApiError, describe_error

Status = Literal["queued", "in_progress", "completed", "failed"]
WorkerState = Literal["loading", "ready", "failed"]
_FIX = "restore it from a copy, or choose another data_dir"
_LATEST = 1e11  # largest valid time, in seconds since the epoch
_VERSION = 1
_TABLES = ("jobs", "workers")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL DEFAULT 'queued',
    cancelled INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    error TEXT
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (status, number);
CREATE TABLE IF NOT EXISTS workers (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, message TEXT NOT NULL DEFAULT '', updated_at REAL NOT NULL
);
"""
Row = Sequence[Any]


class Job(Config):
    """A job in the queue, which makes one video."""

    number: int  # order of arrival
    id: str
    status: Status
    cancelled: bool
    request: Mapping[str, Any]  # the client's request, with the field names of the API
    created_at: float = Field(ge=0, le=_LATEST)  # seconds since the epoch, like the other times
    started_at: float | None = Field(ge=0, le=_LATEST)
    completed_at: float | None = Field(ge=0, le=_LATEST)
    step: int = Field(ge=0)  # completed denoising steps out of `steps`
    steps: int = Field(ge=0)
    attempts: int
    worker: str | None
    error: Mapping[str, str] | None

    @property
    def progress(self) -> int:
        """The progress in percent. It stays at 99 while the video is decoded and written."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0

    @property
    def notes(self) -> list[str]:
        """Notes on the request for the user."""
        return list(self.request.get("notes", ()))


COLUMNS = ", ".join(Job.model_fields)


class _Fields(Config):
    """The fields of the request, or defaults of the server, that clients see."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: float = Field(default=16.0, gt=0)


class _Request(Config):
    """The parts of a request that the server reads before a worker checks the whole request."""

    model_config = ConfigDict(extra="allow")

    fields: _Fields
    files: dict[str, list[str]]
    notes: tuple[str, ...] = ()
    defaults: _Fields = _Fields()
    source: str | None = None


def prepare(database: sqlite3.Connection) -> None:
    """Create the tables, or check those of an existing file.

    Raises DataError for a different version, damaged pages or unexpected columns, and sqlite3.Error if the
    file is not a database.
    """
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        raise DataError(
            f"is a queue of version {version}", expected=f"version {_VERSION}", fix="choose another data_dir"
        )
    _check(database)
    _make_tables(database)
    with sqlite3.connect(":memory:") as fresh:
        _make_tables(fresh)
        for table in _TABLES:
            _compare(table, _columns(database, table), _columns(fresh, table))
    fresh.close()
    database.execute(f"PRAGMA user_version = {_VERSION}")


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of the file at `path`, or None if there is no file."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def check_pages(path: Path) -> None:
    """Raise DataError if pages are damaged. Opens a new connection, because others have cached pages."""
    with suppress(sqlite3.OperationalError):  # a locked file or a full disk is not damage
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            _check(database)
            if database.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                raise DataError("is damaged: it was emptied", fix=_FIX)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise DataError(f"is damaged: {error}", fix=_FIX) from None
        finally:
            database.close()


def _check(database: sqlite3.Connection) -> None:
    found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise DataError(f"is damaged: {found}", fix=_FIX)


def _make_tables(database: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        database.execute(statement)


def _columns(database: sqlite3.Connection, table: str) -> dict[str, str]:
    """Map each column to its type, NOT NULL constraint and primary key."""
    rows = database.execute('SELECT name, type, "notnull", pk FROM pragma_table_info(?)', (table,))
    return {row[0]: f"{row[1]} {'NOT NULL' if row[2] else ''} {'KEY' if row[3] else ''}" for row in rows}


def _compare(table: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    if found != expected:
        wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        raise DataError(
            f"its table {table} belongs to another program: {', '.join(wrong)} differ",
            expected=f"the columns {', '.join(expected)}",
            fix=_FIX,
        )


def read_row(row: Row) -> Job:
    """Convert a row of COLUMNS to a job. An unreadable row becomes a failed job."""
    problem = row_problem(row)
    return unreadable_job(row, problem) if problem else _job(row)


def row_problem(row: Row) -> str:
    """Return why a row is unreadable, or "" if it is readable."""
    try:
        job = _job(row)
        parse(_Request, job.request, "request")
    except (ConfigError, ValueError, TypeError, RecursionError) as error:
        return str(error)
    if job.error is not None and "code" not in job.error:
        return "error has no code"
    return ""


def unreadable_job(row: Row, problem: str) -> Job:
    """Return a failed job for an unreadable row."""
    known, now = dict(zip(Job.model_fields, row, strict=True)), time.time()
    created = known["created_at"]
    error = ApiError(
        500, "unreadable_job", f"its row in the queue cannot be read: {problem}", fix="send the request again"
    )
    return Job(
        number=known["number"],
        id=str(known["id"]),
        status="failed",
        cancelled=bool(known["cancelled"]),
        request={"fields": {"prompt": ""}, "files": {}},
        created_at=created if isinstance(created, float) and 0 <= created <= _LATEST else now,
        started_at=None,
        completed_at=now,
        step=0,
        steps=0,
        attempts=0,
        worker=None,
        error=describe_error(error),
    )


def _job(row: Row) -> Job:
    values = dict(zip(Job.model_fields, row, strict=True))
    error = values["error"]
    values |= {
        "cancelled": bool(values["cancelled"]),
        "request": json.loads(values["request"]),
        "error": None if error is None else json.loads(error),
    }
    return parse(Job, values, "")
