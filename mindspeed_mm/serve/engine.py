"""The workers of a server: started together, watched, and started again when one dies. No torch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mindspeed_mm.files import write_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.processes import LAUNCHER
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.folders import JobFolders
from mindspeed_mm.serve.jobs import JobStore

LOGGER = get_logger(__name__)
_POLL = 0.2
_GRACE = 15.0  # seconds between asking a worker to end and ending it
_LONGEST_PAUSE = 60.0  # before a worker that keeps dying is started again
_LATE = 60.0  # seconds beyond job_timeout before a worker that hangs within a step is killed


class Engine:
    """One group of worker processes. A thread of the server watches them; the queue is all they share."""

    def __init__(
        self, store: JobStore, folders: JobFolders, settings: ServeConfig, worker: Mapping[str, Any]
    ) -> None:
        """`worker`: what the worker's settings file holds."""
        self.store, self.folders, self.settings, self.worker = store, folders, settings, worker
        self.restarts = 0
        self.was_ready = False  # since the server started
        self._over = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._watch, name="engine", daemon=True)

    def start(self) -> None:
        """Take up the queue that an earlier server left, and start the workers."""
        self.store.release(blame=False)
        self._thread.start()

    def stop(self) -> None:
        """End the workers. What they were at waits for the next start."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_GRACE + 5)

    def state(self) -> tuple[str, str]:
        """loading, ready or failed; and a message for people."""
        workers = self.store.workers().values()
        for state, message in workers:
            if state == "failed":
                return "failed", message
        if len(workers) == self.settings.devices and all(state == "ready" for state, _ in workers):
            self.was_ready = True
            return "ready", ""
        return "loading", "the weights are being read"

    def _watch(self) -> None:
        pause = 1.0
        while not self._over.is_set():
            started = time.monotonic()
            self._spawn()
            self._wait()
            self._end_all()
            if self._over.is_set():
                break
            for job in self.store.release(blame=True):
                LOGGER.warning("%s: failed: its worker died %d times", job.id, job.attempts)
            pause = 1.0 if time.monotonic() - started > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
            self.restarts += 1
            LOGGER.warning("a worker ended; starting all again in %.0f s", pause)
            self._over.wait(pause)
        self.store.release(blame=False)
        self.store.close()

    def _spawn(self) -> None:
        path = Path(self.worker["data_dir"]) / "worker.json"
        write_json(path, dict(self.worker))
        count = self.settings.devices
        environment = {**os.environ, LAUNCHER: str(os.getpid())}
        ranks: list[dict[str, str]] = [{}]
        if count > 1:
            shared = {
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
            ranks = [{**shared, "RANK": str(index), "LOCAL_RANK": str(index)} for index in range(count)]
        name = f"{os.getpid()}.{self.restarts}"
        command = [sys.executable, "-m", "mindspeed_mm.serve.worker", str(path), name]
        self._processes = [
            subprocess.Popen(command, env={**environment, **place}, stdin=subprocess.DEVNULL)
            for place in ranks
        ]

    def _wait(self) -> None:
        """Until a worker ends, hangs, or the server stops; cleans up meanwhile."""
        while not self._over.wait(_POLL):
            if any(process.poll() is not None for process in self._processes):
                return
            for job in self.store.overdue(self.settings.job_timeout + _LATE):
                LOGGER.warning("%s: its worker hangs and is ended", job.id)
                return
            self.clean()

    def clean(self) -> None:
        """Delete what was cancelled and what has been kept long enough."""
        gone = self.store.purge()
        if self.settings.keep_hours is not None:
            gone += self.store.expired(time.time() - 3600 * self.settings.keep_hours)
        for job_id in gone:
            self.folders.remove(job_id)
            self.store.forget(job_id)

    def _end_all(self) -> None:
        """End the workers: at once when one has died, for the others may wait for it in a collective."""
        if not self._over.is_set():
            for process in self._processes:
                process.kill()
        for process in self._processes:
            with suppress(OSError):
                process.terminate()
        until = time.monotonic() + _GRACE
        for process in self._processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
