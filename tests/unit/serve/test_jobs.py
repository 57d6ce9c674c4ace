"""The queue: order, cancellation, what a dead worker or server leaves behind."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from mindspeed_mm.errors import DataError
from mindspeed_mm.serve.folders import JobFolders
from mindspeed_mm.serve.jobs import DATABASE, JobStore, make_id
from tests.support.errors import raises
from tests.support.server import Server

REQUEST = {"fields": {"prompt": "a ball"}, "files": {}}


def filled(folder: Path, count: int) -> tuple[JobStore, list[str]]:
    store = JobStore(folder)
    made = [store.add(REQUEST, limit=100) for _ in range(count)]
    return store, [job.id for job in made if job is not None]


def test_jobs_are_claimed_in_order_and_once(tmp_path: Path) -> None:
    store, ids = filled(tmp_path, 3)
    claimed = [store.claim(worker) for worker in ("a", "b", "a", "a")]
    assert [job and job.id for job in claimed] == [*ids, None]


def test_queue_takes_no_more_than_its_limit(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 2)
    assert store.add(REQUEST, limit=2) is None
    store.claim("a")
    assert store.add(REQUEST, limit=2) is not None


def test_cancelled_job_stops_its_worker_and_is_purged_after(tmp_path: Path) -> None:
    store, ids = filled(tmp_path, 1)
    job = store.claim("a")
    assert store.should_continue(job)
    store.cancel(ids[0])
    assert store.get(ids[0]) is None
    assert not store.should_continue(job)
    assert store.purge() == []  # the worker still writes
    store.finish(job, {"code": "cancelled"})
    assert store.purge() == ids


def test_worker_that_lost_its_job_cannot_finish_it(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 1)
    stale = store.claim("a")
    store.release(["a", "b"])
    again = store.claim("b")
    assert not store.finish(stale)
    assert store.finish(again)


def test_job_fails_when_its_worker_dies_twice(tmp_path: Path) -> None:
    store, ids = filled(tmp_path, 1)
    store.claim("a")
    assert store.release(["a", "b"]) == []
    store.claim("b")
    assert [job.id for job in store.release(["a", "b"])] == ids
    assert store.get(ids[0]).status == "failed"
    assert store.get(ids[0]).error["code"] == "worker_died"


def test_only_the_worker_that_died_is_blamed(tmp_path: Path) -> None:
    store, ids = filled(tmp_path, 2)
    for _ in range(2):
        store.claim("a")
        store.claim("b")
        store.release(["a"])
    assert [store.get(video).status for video in ids] == ["failed", "queued"]
    assert "died 2 times" in store.get(ids[0]).error["message"]


def test_stopped_servers_do_not_count_as_attempts(tmp_path: Path) -> None:
    store, ids = filled(tmp_path, 1)
    for _ in range(5):
        store.claim("a")
        store.release(())
    assert store.get(ids[0]).status == "queued"


def test_progress_is_99_percent_until_files_are_written(tmp_path: Path) -> None:
    store, ids = filled(tmp_path, 1)
    job = store.claim("a")
    store.advance(job, 10, 10)
    assert store.get(ids[0]).progress == 99
    store.finish(job)
    assert store.get(ids[0]).progress == 100


def _claim_all(folder: str, worker: str, taken: multiprocessing.Queue) -> None:
    store = JobStore(Path(folder))
    while (job := store.claim(worker)) is not None:
        store.finish(job)
        taken.put(job.id)


def test_processes_share_a_queue_without_taking_a_job_twice(tmp_path: Path) -> None:
    _, ids = filled(tmp_path, 60)
    context = multiprocessing.get_context("fork")
    taken = context.Queue()
    workers = [context.Process(target=_claim_all, args=(str(tmp_path), name, taken)) for name in "abc"]
    for worker in workers:
        worker.start()
    found = [taken.get(timeout=60) for _ in ids]
    for worker in workers:
        worker.join(60)
    assert sorted(found) == sorted(ids)


def test_foreign_queue_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database" * 100)
    with raises(DataError, where=str(tmp_path / DATABASE)):
        JobStore(tmp_path)


def test_queue_of_a_later_version_is_rejected(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute("PRAGMA user_version = 9")
    with raises(DataError, 9, 1, where=str(tmp_path / DATABASE)):
        JobStore(tmp_path)


def test_queue_with_overwritten_pages_is_rejected(tmp_path: Path) -> None:
    store, _ = filled(tmp_path, 100)
    store.close()
    path = tmp_path / DATABASE
    content = bytearray(path.read_bytes())
    content[4096:] = b"x" * (len(content) - 4096)
    path.write_bytes(content)
    with raises(DataError, "data_dir", where=str(path)):
        JobStore(tmp_path)


@pytest.mark.parametrize(
    ("table", "old", "new"), [("jobs", "worker", "owner"), ("workers", "message", "text")]
)
def test_queue_of_other_columns_is_rejected(tmp_path: Path, table: str, old: str, new: str) -> None:
    filled(tmp_path, 1)[0].close()
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")
    with raises(DataError, table, old, new, "data_dir", where=str(tmp_path / DATABASE)):
        JobStore(tmp_path)


UNREADABLE = (
    "request = '{'",
    """request = '{"files": 5, "fields": [1]}'""",
    """request = '{"files": {}, "fields": {"prompt": 5}}'""",
    """request = '{"files": {}, "fields": {"prompt": "a", "fps": 0}}'""",
    "request = '" + "[" * 100_000 + "'",
    "request = x'ff'",
    "created_at = 'soon'",
    "created_at = 9e999",
    "status = 'lost'",
    "steps = -1",
    "error = '{}'",
    "error = '[1]'",
)


@pytest.mark.parametrize("change", UNREADABLE, ids=lambda change: change[:30])
def test_unreadable_row_fails_and_others_are_served(tmp_path: Path, change: str) -> None:
    store, ids = filled(tmp_path, 3)
    store.close()
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute(f"UPDATE jobs SET {change} WHERE id = ?", (ids[1],))
    server = Server(tmp_path)
    listed = server.client.get("/v1/videos", params={"order": "asc"})
    assert listed.status_code == 200
    videos = {video["id"]: video for video in listed.json()["data"]}
    assert [videos[video]["status"] for video in ids] == ["queued", "failed", "queued"]
    assert videos[ids[1]]["error"]["code"] == "unreadable_job"
    assert [job and job.id for job in map(server.store.claim, "abc")] == [ids[0], ids[2], None]
    with sqlite3.connect(tmp_path / DATABASE) as database:
        assert database.execute("SELECT status FROM jobs WHERE id = ?", (ids[1],)).fetchone() == ("failed",)


def test_finished_videos_outlive_a_lost_queue(tmp_path: Path) -> None:
    folders = JobFolders(tmp_path)
    finished, unfinished, draft = make_id(), make_id(), folders.draft(make_id())
    for job in (finished, unfinished):
        (folders.of(job) / "inputs").mkdir(parents=True)
    folders.result(finished).write_bytes(b"")
    assert folders.sweep(set()) == 2
    assert folders.result(finished).exists()
    assert not folders.of(unfinished).exists()
    assert not draft.exists()
