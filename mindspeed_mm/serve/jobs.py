"""JobStore: the queue of a server, in one SQLite file that the server and its workers share. No torch.

Every change is one transaction of a database in WAL mode, so a killed process loses nothing that a client has heard of.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import DataError
from mindspeed_mm.log import get_logger
from mindspeed_mm.serve.problem import ApiError, describe_error
from mindspeed_mm.serve.queue_file import (
    COLUMNS,
    Job,
    WorkerState,
    check_pages,
    identity_of,
    prepare,
    read_row,
    row_problem,
    unreadable_job,
)

logger = get_logger(__name__)

DATABASE = "queue.sqlite3"
MAX_ATTEMPTS = 2  # a job whose worker died is tried once more


class JobStore:
    """The queue. Each thread has a connection of its own."""

    def __init__(self, folder: Path) -> None:
        """Make the database in `folder`, or open it. Raises DataError for a file that is not a queue of ours."""
        self.path = folder / DATABASE
        self._local = threading.local()
        self._identity: tuple[int, int] | None = None
        try:
            with self._transaction() as database:
                prepare(database)
                self._fail_unreadable(database)
            self._identity = identity_of(self.path)
        except sqlite3.Error as error:
            raise DataError(
                f"cannot be used as a queue: {error}", where=self.path, fix="choose another data_dir"
            ) from None
        except DataError as error:
            raise error.at(self.path) from None

    def _fail_unreadable(self, database: sqlite3.Connection) -> None:
        """Let jobs whose row says nothing that can be served fail, so that the others are."""
        rows = database.execute(f"SELECT {COLUMNS} FROM jobs ORDER BY number").fetchall()
        failed = [unreadable_job(row, problem) for row in rows if (problem := row_problem(row))]
        for job in failed:
            database.execute(
                "UPDATE jobs SET id = ?, status = ?, request = ?, created_at = ?, "
                "started_at = NULL, completed_at = ?, step = 0, steps = 0, attempts = 0, worker = NULL, "
                "error = ? WHERE number = ?",
                (
                    job.id,
                    job.status,
                    json.dumps(job.request),
                    job.created_at,
                    job.completed_at,
                    json.dumps(job.error),
                    job.number,
                ),
            )
        if failed:
            logger.warning(
                "%s: %d unreadable jobs failed: %s",
                self.path,
                len(failed),
                ", ".join(job.id for job in failed),
            )

    def add(self, request: Mapping[str, Any], *, limit: int, new_id: str | None = None) -> Job | None:
        """Queue a video; None when `limit` are waiting already."""
        with self._transaction() as database:
            waiting = database.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()[0]
            if waiting >= limit:
                return None
            job_id = new_id or make_id()
            database.execute(
                "INSERT INTO jobs (id, request, created_at) VALUES (?, ?, ?)",
                (job_id, json.dumps(request), time.time()),
            )
        return self.get(job_id)

    def get(self, job_id: str) -> Job | None:
        """The job, unless it is unknown or cancelled."""
        rows = self._select("id = ? AND NOT cancelled", (job_id,))
        return rows[0] if rows else None

    def page(self, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """At most `limit` jobs behind job `after`, and whether there are more. Raises KeyError for an unknown `after`."""
        condition, values = "NOT cancelled", []
        if after is not None:
            before = self.get(after)
            if before is None:
                raise KeyError(after)
            condition += f" AND number {'<' if newest_first else '>'} ?"
            values.append(before.number)
        order = "DESC" if newest_first else "ASC"
        found = self._select(condition, (*values, limit + 1), f"ORDER BY number {order} LIMIT ?")
        return found[:limit], len(found) > limit

    def counts(self) -> dict[str, int]:
        """How many jobs each status has."""
        rows = self._database().execute(
            "SELECT status, count(*) FROM jobs WHERE NOT cancelled GROUP BY status"
        )
        return {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0, **dict(rows)}

    def ids(self) -> set[str]:
        """All jobs, the cancelled ones too."""
        return {row[0] for row in self._database().execute("SELECT id FROM jobs")}

    def position(self, job: Job) -> int:
        """How many jobs are served before this one; 0 when it is next or no longer waiting."""
        found = self._database().execute(
            "SELECT count(*) FROM jobs WHERE status IN ('queued', 'in_progress') AND NOT cancelled AND number < ?",
            (job.number,),
        )
        return int(found.fetchone()[0]) if job.status == "queued" else 0

    def cancel(self, job_id: str) -> Job | None:
        """Hide a job and let its worker stop. Returns it as it was; None for an unknown one.

        The caller removes its files, unless a worker is at it: then `purge` does once the worker has let go.
        """
        job = self.get(job_id)
        if job is not None:
            with self._transaction() as database:
                database.execute("UPDATE jobs SET cancelled = 1 WHERE id = ?", (job_id,))
        return job

    def purge(self) -> list[str]:
        """Forget the cancelled jobs that no worker is at. Returns their ids: their files are to be removed first."""
        rows = self._database().execute("SELECT id FROM jobs WHERE cancelled AND status != 'in_progress'")
        return [row[0] for row in rows]

    def forget(self, job_id: str) -> None:
        """Remove the row of a job whose files are gone."""
        with self._transaction() as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def expired(self, before: float) -> list[str]:
        """The ids of jobs that ended before `before`."""
        rows = self._database().execute(
            "SELECT id FROM jobs WHERE status IN ('completed', 'failed') AND completed_at < ?", (before,)
        )
        return [row[0] for row in rows]

    # What a worker calls

    def claim(self, worker: str) -> Job | None:
        """The next job, now in progress and of this worker; None when none waits."""
        with self._transaction() as database:
            row = database.execute(
                "SELECT id FROM jobs WHERE status = 'queued' AND NOT cancelled ORDER BY number LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE jobs SET status = 'in_progress', worker = ?, started_at = ?, step = 0, steps = 0, "
                "attempts = attempts + 1 WHERE id = ?",
                (worker, time.time(), row[0]),
            )
        return self.get(row[0])

    def advance(self, job: Job, step: int, steps: int) -> None:
        """Note that `step` of `steps` are done."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET step = ?, steps = ? WHERE id = ? AND worker = ? AND status = 'in_progress'",
                (step, steps, job.id, job.worker),
            )

    def remark(self, job: Job, notes: Sequence[str]) -> None:
        """Keep what the user should know about the request, in place of what was known before."""
        request = {**job.request, "notes": list(notes)}
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET request = ? WHERE id = ? AND worker = ? AND status = 'in_progress'",
                (json.dumps(request), job.id, job.worker),
            )

    def should_continue(self, job: Job) -> bool:
        """Whether the worker should continue: not when the job was cancelled or taken away. Costs no write."""
        found = self._database().execute(
            "SELECT 1 FROM jobs WHERE id = ? AND worker = ? AND status = 'in_progress' AND NOT cancelled",
            (job.id, job.worker),
        )
        return found.fetchone() is not None

    def finish(self, job: Job, error: Mapping[str, str] | None = None) -> bool:
        """The video is there, or failed with `error`. False when the job is no longer this worker's."""
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET status = ?, completed_at = ?, error = ?, worker = NULL "
                "WHERE id = ? AND worker = ? AND status = 'in_progress'",
                (
                    "completed" if error is None else "failed",
                    time.time(),
                    None if error is None else json.dumps(error),
                    job.id,
                    job.worker,
                ),
            )
            return changed.rowcount == 1

    # What the server calls when workers come and go

    def release(self, blamed: Collection[str], *, only: str | None = None) -> list[Job]:
        """Take every job from the workers, or from `only` one, which have ended.

        Jobs wait again; returns those that failed instead.

        `blamed`: workers that died by themselves, perhaps of their job, which therefore is tried MAX_ATTEMPTS times at most.
        The attempt of any other worker, which was stopped, does not count.
        """
        failed = []
        running = self._select("status = 'in_progress' AND (? IS NULL OR worker = ?)", (only, only))
        with self._transaction() as database:
            for job in running:
                counts = job.worker in blamed
                if counts and job.attempts >= MAX_ATTEMPTS and not job.cancelled:
                    database.execute(
                        "UPDATE jobs SET status = 'failed', completed_at = ?, worker = NULL, error = ? WHERE id = ?",
                        (time.time(), json.dumps(_died(job.attempts)), job.id),
                    )
                    failed.append(job)
                    continue
                database.execute(
                    "UPDATE jobs SET status = 'queued', worker = NULL, started_at = NULL, step = 0, "
                    "attempts = ? WHERE id = ?",
                    (job.attempts if counts else job.attempts - 1, job.id),
                )
            database.execute("DELETE FROM workers WHERE ? IS NULL OR id = ?", (only, only))
        return failed

    def set_worker(self, worker: str, state: WorkerState, message: str = "") -> None:
        """Note what a worker does."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO workers (id, state, message, updated_at) VALUES (?, ?, ?, ?)",
                (worker, state, message, time.time()),
            )

    def workers(self) -> dict[str, tuple[WorkerState, str]]:
        """Worker → its state and a message."""
        rows = self._database().execute("SELECT id, state, message FROM workers")
        return {row[0]: (row[1], row[2]) for row in rows}

    def overdue(self, seconds: float) -> list[Job]:
        """The jobs that have been in progress for longer than `seconds`."""
        return self._select("status = 'in_progress' AND started_at < ?", (time.time() - seconds,))

    def damage(self, *, thoroughly: bool = False) -> str:
        """What is wrong with the file, one sentence; empty when nothing is. `thoroughly`: read all of it."""
        try:
            if identity_of(self.path) != self._identity:
                return f"{DATABASE} was deleted or replaced while the server runs"
            if thoroughly:
                check_pages(self.path)
        except DataError as error:
            return f"{DATABASE} {error.problem}"
        return ""

    def close(self) -> None:
        """Close this thread's connection."""
        database = getattr(self._local, "database", None)
        if database is not None:
            database.close()
            del self._local.database

    def _database(self) -> sqlite3.Connection:
        database: sqlite3.Connection | None = getattr(self._local, "database", None)
        if database is None:
            # only the first one makes the file: another would be a second, empty queue
            address = f"{self.path.absolute().as_uri()}?mode={'rwc' if self._identity is None else 'rw'}"
            database = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")  # what a client has heard of outlives a power cut
            self._local.database = database
        return database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._database()
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")

    def _select(self, condition: str, values: tuple[Any, ...], order: str = "ORDER BY number") -> list[Job]:
        rows = self._database().execute(f"SELECT {COLUMNS} FROM jobs WHERE {condition} {order}", values)
        return [read_row(row) for row in rows]


def _died(attempts: int) -> dict[str, str]:
    problem = f"the worker died {attempts} times while it made this video"
    fix = "a smaller size or fewer frames need less memory"
    return describe_error(ApiError(500, "worker_died", problem, fix=fix))


def make_id() -> str:
    """A name that nobody can guess."""
    return f"video_{secrets.token_hex(12)}"
