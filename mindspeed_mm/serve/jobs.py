"""JobStore: a server's queue in one SQLite file, which the server and its workers share.

Each change is one transaction of a database in WAL mode, so a killed process loses no change that a client
has seen. Does not import torch.
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
MAX_ATTEMPTS = 2  # a job whose worker died is retried once


class JobStore:
    """The queue of jobs. Each thread has its own connection."""

    def __init__(self, folder: Path) -> None:
        """Create the database in `folder`, or open it. Raises DataError if the file is not a valid queue."""
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
        """Mark jobs with unreadable rows as failed, so that the others can be served."""
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
        """Add a job to the queue. Returns None if `limit` jobs are already queued."""
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
        """Return the job, or None if it is unknown or cancelled."""
        rows = self._select("id = ? AND NOT cancelled", (job_id,))
        return rows[0] if rows else None

    def page(self, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """Return up to `limit` jobs that follow the job `after`, and whether there are more.

        Raises KeyError if `after` is unknown.
        """
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
        """Return the number of jobs with each status."""
        rows = self._database().execute(
            "SELECT status, count(*) FROM jobs WHERE NOT cancelled GROUP BY status"
        )
        return {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0, **dict(rows)}

    def ids(self) -> set[str]:
        """Return the ids of all jobs, including cancelled ones."""
        return {row[0] for row in self._database().execute("SELECT id FROM jobs")}

    def position(self, job: Job) -> int:
        """Return the number of unfinished jobs ahead of this one, or 0 if it is not queued."""
        found = self._database().execute(
            "SELECT count(*) FROM jobs "
            "WHERE status IN ('queued', 'in_progress') AND NOT cancelled AND number < ?",
            (job.number,),
        )
        return int(found.fetchone()[0]) if job.status == "queued" else 0

    def cancel(self, job_id: str) -> Job | None:
        """Mark a job as cancelled, which hides it and stops its worker.

        Returns the job as it was before, or None if it is unknown. The caller then deletes the files of the
        jobs that `purge` returns, which include a job in progress only after its worker has stopped it.
        """
        job = self.get(job_id)
        if job is not None:
            with self._transaction() as database:
                database.execute("UPDATE jobs SET cancelled = 1 WHERE id = ?", (job_id,))
        return job

    def purge(self) -> list[str]:
        """Return the ids of cancelled jobs that are not in progress.

        The caller deletes their files, and then calls `forget`.
        """
        rows = self._database().execute("SELECT id FROM jobs WHERE cancelled AND status != 'in_progress'")
        return [row[0] for row in rows]

    def forget(self, job_id: str) -> None:
        """Delete the row of a job. Called after its files are deleted."""
        with self._transaction() as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def expired(self, before: float) -> list[str]:
        """Return the ids of jobs that completed or failed before the time `before`."""
        rows = self._database().execute(
            "SELECT id FROM jobs WHERE status IN ('completed', 'failed') AND completed_at < ?", (before,)
        )
        return [row[0] for row in rows]

    # Methods for workers

    def claim(self, worker: str) -> Job | None:
        """Assign the next queued job to this worker and return it, or None if no job is queued."""
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
        """Record that `step` of `steps` denoising steps are done."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET step = ?, steps = ? WHERE id = ? AND worker = ? AND status = 'in_progress'",
                (step, steps, job.id, job.worker),
            )

    def add_notes(self, job: Job, notes: Sequence[str]) -> None:
        """Store notes on the request for the user. They replace earlier notes."""
        request = {**job.request, "notes": list(notes)}
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET request = ? WHERE id = ? AND worker = ? AND status = 'in_progress'",
                (json.dumps(request), job.id, job.worker),
            )

    def should_continue(self, job: Job) -> bool:
        """Return whether the job still belongs to the worker and is not cancelled. Writes nothing."""
        found = self._database().execute(
            "SELECT 1 FROM jobs WHERE id = ? AND worker = ? AND status = 'in_progress' AND NOT cancelled",
            (job.id, job.worker),
        )
        return found.fetchone() is not None

    def finish(self, job: Job, error: Mapping[str, str] | None = None) -> bool:
        """Mark the job as completed, or as failed with `error`.

        Returns False if the job no longer belongs to this worker.
        """
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

    # Methods for the server, when workers start and stop

    def release(self, blamed: Collection[str], *, only: str | None = None) -> list[Job]:
        """Put the jobs of stopped workers back in the queue: of all workers, or of the worker `only`.

        `blamed` are workers that died on their own, perhaps because of their job. This counts as an attempt,
        and a job fails after MAX_ATTEMPTS attempts. The server stopped the other workers, so their attempts
        do not count.

        Returns the jobs that failed.
        """
        failed = []
        running = self._select("status = 'in_progress' AND (? IS NULL OR worker = ?)", (only, only))
        with self._transaction() as database:
            for job in running:
                counts = job.worker in blamed
                if counts and job.attempts >= MAX_ATTEMPTS and not job.cancelled:
                    database.execute(
                        "UPDATE jobs SET status = 'failed', completed_at = ?, worker = NULL, error = ? "
                        "WHERE id = ?",
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
        """Record the state of a worker."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO workers (id, state, message, updated_at) VALUES (?, ?, ?, ?)",
                (worker, state, message, time.time()),
            )

    def workers(self) -> dict[str, tuple[WorkerState, str]]:
        """Map each worker to its state and a message."""
        rows = self._database().execute("SELECT id, state, message FROM workers")
        return {row[0]: (row[1], row[2]) for row in rows}

    def overdue(self, seconds: float) -> list[Job]:
        """Return the jobs that have been in progress for more than `seconds`."""
        return self._select("status = 'in_progress' AND started_at < ?", (time.time() - seconds,))

    def damage(self, *, thoroughly: bool = False) -> str:
        """Return a sentence on the damage to the queue's file, or "" if there is none.

        `thoroughly`: whether to read the whole file.
        """
        try:
            if identity_of(self.path) != self._identity:
                return f"{DATABASE} was deleted or replaced while the server was running"
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
            # Only the first connection may create the file. If the file has been deleted since, a later
            # connection would create a second, empty queue.
            address = f"{self.path.absolute().as_uri()}?mode={'rwc' if self._identity is None else 'rw'}"
            database = sqlite3.connect(address, uri=True, timeout=30, isolation_level=None)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")  # committed changes survive a power failure
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
    problem = f"the worker died {attempts} times while making this video"
    fix = "a smaller size or fewer frames need less memory"
    return describe_error(ApiError(500, "worker_died", problem, fix=fix))


def make_id() -> str:
    """Return a random job id that cannot be guessed."""
    return f"video_{secrets.token_hex(12)}"
