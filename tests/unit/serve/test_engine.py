"""The engine with stand-ins for workers.

What it does when one ends, fails to load, or the queue cannot be written.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.engine import Engine
from mindspeed_mm.serve.folders import JobFolders
from mindspeed_mm.serve.jobs import JobStore
from tests.support.runs import alive

ROOT = Path(__file__).resolve().parents[3]

REQUEST = {"fields": {"prompt": "a ball"}, "files": {}}


class StubEngine(Engine):
    """Starts `commands` in place of workers, one after the other, and calls each `ready` or `failed`."""

    states: tuple[str, ...] = ("ready",)
    commands: tuple[str, ...] = ("sleep", "60")

    def _spawn(self) -> None:
        self._name = f"stub.{self.restarts}"
        self._processes = [subprocess.Popen(self.commands) for _ in range(self.settings.devices)]
        state = self.states[min(self.restarts, len(self.states) - 1)]
        for index in range(self.settings.devices):
            self.store.set_worker(
                f"{self._name}.{index}", state, "no such weights" if state == "failed" else ""
            )


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., StubEngine]]:
    engines = []

    def make(**settings: object) -> StubEngine:
        config = ServeConfig(data_dir=str(tmp_path), **settings)
        worker = {"data_dir": str(tmp_path), "base": {}}
        engines.append(StubEngine(JobStore(tmp_path), JobFolders(tmp_path), config, worker))
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_worker_that_still_imports_ends_with_its_server(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print(1, flush=True); import time; time.sleep(60)\n")
    body = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'mindspeed_mm.serve.start_worker', 'x', 'y'], "
        "stdout=subprocess.PIPE, start_new_session=True, "
        f"env={{**os.environ, 'MINDSPEED_MM_LAUNCHER': str(os.getpid()), 'PYTHONPATH': {str(tmp_path)!r}}})\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    worker = int(server.stdout.readline())
    server.kill()
    server.communicate()
    assert not alive([worker], 10)


def test_ready_workers_are_ended_with_the_engine(made: Callable[..., StubEngine]) -> None:
    engine = made(devices=2)
    assert engine.state()[0] == "failed"  # not started
    engine.start()
    wait_for(lambda: engine.state() == ("ready", ""))
    engine.stop()
    assert all(process.poll() is not None for process in engine._processes)


def test_load_that_fails_is_named_while_it_is_tried_again(made: Callable[..., StubEngine]) -> None:
    engine = made()
    engine.commands, engine.states = ("false",), ("failed",)
    engine.start()
    wait_for(lambda: engine.restarts > 0)
    for _ in range(20):
        assert engine.state() == ("failed", "no such weights")
        time.sleep(0.02)


def test_error_of_the_queue_does_not_end_the_engine(
    made: Callable[..., StubEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> list[str]:
        monkeypatch.undo()
        raise sqlite3.OperationalError("database or disk is full")

    engine = made()
    monkeypatch.setattr(engine.store, "purge", full)
    engine.start()
    wait_for(lambda: engine.restarts == 1)
    first = engine._processes[0]
    wait_for(lambda: engine._processes[0] is not first and engine.state()[0] == "ready")
    assert first.poll() is not None


def test_job_that_hangs_fails_and_is_not_tried_again(made: Callable[..., StubEngine]) -> None:
    engine = made(job_timeout=0.001)
    engine.start()
    wait_for(lambda: engine.state()[0] == "ready")
    queued = engine.store.add(REQUEST, limit=9)
    other = engine.store.add(REQUEST, limit=9)
    engine.store.claim("stub.0.0")
    with engine.store._transaction() as database:
        database.execute("UPDATE jobs SET started_at = started_at - 1000 WHERE id = ?", (queued.id,))
    wait_for(lambda: engine.restarts == 1)
    assert engine.store.get(queued.id).error["code"] == "timeout"
    assert engine.store.get(other.id).status == "queued"


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"x" * (len(content) - 4096))


def replace(path: Path) -> None:
    path.unlink()
    JobStore(path.parent).close()


@pytest.mark.parametrize(
    "harm",
    [overwrite, replace, Path.unlink, lambda path: path.write_bytes(b"")],
    ids=["overwritten", "replaced", "deleted", "emptied"],
)
def test_queue_that_is_damaged_meanwhile_ends_the_work(
    made: Callable[..., StubEngine], monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    monkeypatch.setattr("mindspeed_mm.serve.engine._CHECK", 0.0)
    engine = made()
    engine.start()
    wait_for(lambda: engine.state()[0] == "ready")
    with sqlite3.connect(engine.store.path) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    harm(engine.store.path)
    wait_for(lambda: bool(engine.damage))
    assert engine.state() == ("failed", engine.damage)
    assert engine.store.path.name in engine.damage
    assert str(engine.store.path) not in engine.damage  # clients see it
    wait_for(lambda: engine._processes[0].poll() is not None)
    assert engine.restarts == 0
