"""Starts the workers of a server, watches them, and restarts all if one dies. Does not import torch."""

from __future__ import annotations

import os
import socket
import sqlite3
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
from mindspeed_mm.serve.problem import ApiError, describe_error

LOGGER = get_logger(__name__)
_POLL = 0.2
_GRACE = 15.0  # seconds that a worker has to exit before it is killed
_LONGEST_PAUSE = 60.0  # maximum seconds before restarting workers that keep dying
_CHECK = 60.0  # seconds between full checks of the queue's file
_LATE = 60.0  # seconds beyond job_timeout after which a worker that hangs within a step is killed


class Engine:
    """A group of worker processes, watched by a thread of the server.

    The server and the workers communicate only through the queue.
    """

    def __init__(
        self, store: JobStore, folders: JobFolders, settings: ServeConfig, worker: Mapping[str, Any]
    ) -> None:
        """`worker`: the content of the workers' settings file."""
        self.store, self.folders, self.settings, self.worker = store, folders, settings, worker
        self.restarts = 0
        self.was_ready = False  # whether the workers have been ready since the server started
        self.damage = ""  # damage of the queue's file, found while the server runs
        self._checked = time.monotonic()
        self.failure = ""  # why the workers last ended; cleared once all are ready again
        self._name = ""
        self._over = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._watch, name="engine", daemon=True)

    def start(self) -> None:
        """Start the workers."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the workers. Their jobs are queued again for the next start."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_GRACE + 5)

    def state(self) -> tuple[str, str]:
        """Return "loading", "ready" or "failed", and a message for users."""
        if self.damage:
            return "failed", self.damage
        workers = self.store.workers().values()
        if not self._thread.is_alive():
            return "failed", "the engine has ended; see the server's log"
        if len(workers) == self.settings.devices and all(state == "ready" for state, _ in workers):
            self.was_ready, self.failure = True, ""
            return "ready", ""
        failed = [message for state, message in workers if state == "failed"]
        if failed or self.failure:
            return "failed", failed[0] if failed else self.failure
        return "loading", "the weights are being read"

    def _watch(self) -> None:
        pause = 1.0
        while not self._over.is_set():
            started = time.monotonic()
            try:
                self._serve_once()
            except sqlite3.Error as error:
                LOGGER.error("%s: %s", self.store.path, error)
            except Exception:  # such as a full disk or a locked queue, which must not end the server
                LOGGER.exception("the engine continues after an error")
            pause = 1.0 if time.monotonic() - started > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
            if self.check_queue(now=True):
                self._over.wait()
            elif not self._over.is_set():
                self.restarts += 1
                LOGGER.warning("a worker ended; starting all again in %.0f s", pause)
                self._over.wait(pause)
        with suppress(Exception):
            self.store.release(())
            self.store.close()

    def _serve_once(self) -> None:
        """Requeue jobs left in progress, start the workers, and clean up after one has ended."""
        self.store.release(())  # jobs of an earlier server, or of workers whose jobs could not be released
        try:
            self._spawn()
            self._wait()
        finally:
            dead = [index for index, process in enumerate(self._processes) if process.poll() is not None]
            self._end_all()
        failed = [message for state, message in self.store.workers().values() if state == "failed"]
        if self._over.is_set():
            return
        codes = ", ".join(str(self._processes[index].returncode) for index in dead)
        self.failure = failed[0] if failed else f"a worker ended with exit code {codes}" if dead else ""
        # Workers that share a video are blamed together. With data_parallel, only those that died are.
        shares = not self.worker["base"].get("data_parallel")
        blamed = range(len(self._processes)) if shares and dead else dead
        for job in self.store.release([f"{self._name}.{index}" for index in blamed]):
            LOGGER.warning("%s: failed: its worker died %d times", job.id, job.attempts)

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
        self._name = f"{os.getpid()}.{self.restarts}"
        command = [sys.executable, "-m", "mindspeed_mm.serve.start_worker", str(path), self._name]
        self._processes = [
            subprocess.Popen(command, env={**environment, **place}, stdin=subprocess.DEVNULL)
            for place in ranks
        ]

    def _wait(self) -> None:
        """Wait until a worker ends or hangs or the server stops, and delete expired jobs in the meantime."""
        started = time.monotonic()
        while not self._over.wait(_POLL):
            if self.check_queue() or any(process.poll() is not None for process in self._processes):
                return
            if overdue := self.store.overdue(self.settings.job_timeout + _LATE):
                for job in overdue:
                    LOGGER.warning("%s: its worker hangs and is ended", job.id)
                    self.store.finish(job, late_error(self.settings.job_timeout))
                return
            if not self.was_ready and time.monotonic() - started > self.settings.load_timeout:
                LOGGER.warning("the models are not loaded after %g s", self.settings.load_timeout)
                return
            self.state()
            self.clean()

    def check_queue(self, *, now: bool = False) -> bool:
        """Return whether the queue's file is damaged or missing.

        If so, no more videos are made, because their results could not be recorded. Reads the whole file
        once a minute, or if `now` is set.
        """
        if not self.damage and not self._over.is_set():
            thoroughly = now or time.monotonic() - self._checked > _CHECK
            self._checked = time.monotonic() if thoroughly else self._checked
            self.damage = self.store.damage(thoroughly=thoroughly)
            if self.damage:
                fix = "restore it from a copy, or move it away, and start the server again"
                LOGGER.error("%s: %s; no more videos are made: %s", self.store.path.parent, self.damage, fix)
        return bool(self.damage)

    def clean(self) -> None:
        """Delete cancelled jobs, and jobs that finished more than `keep_hours` ago."""
        gone = self.store.purge()
        if self.settings.keep_hours is not None:
            gone += self.store.expired(time.time() - 3600 * self.settings.keep_hours)
        for job_id in gone:
            self.folders.remove(job_id)
            self.store.forget(job_id)

    def _end_all(self) -> None:
        """Stop the workers.

        Kills them immediately unless the server is stopping, because they may be waiting in a collective for
        one that died.
        """
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


def late_error(seconds: float) -> dict[str, str]:
    """Return the error of a video that takes longer than `seconds`."""
    fix = "request fewer frames or a smaller size"
    return describe_error(ApiError(500, "timeout", f"took longer than {seconds:g} s", fix=fix))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
