"""A replica of `vace serve --engine ray`: holds the models on one device and takes jobs from the server.

The queue and all files are on the server's machine. A replica receives a job with its uploads, and sends
back the results. The machines need no shared file system, but each must have the weights at the same path.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mindspeed_mm.files import atomic_path, write_json
from mindspeed_mm.serve.folders import JobFolders
from mindspeed_mm.serve.jobs import JobStore
from mindspeed_mm.serve.queue_file import Job, WorkerState

Files = dict[str, bytes]  # path within a job's folder → content
_HEARTBEAT_SECONDS = 1.0
# Entries of a job's folder that the server already has.
_SERVER_ENTRIES = frozenset({"inputs", "request.json"})


class Queue:
    """A Ray actor on the server's machine that gives replicas on other machines access to the queue."""

    def __init__(self, data_dir: str) -> None:
        self.store, self.folders = JobStore(Path(data_dir)), JobFolders(Path(data_dir))
        self.beats: dict[str, float] = {}

    def beat(self, worker: str) -> None:
        """Record a heartbeat of a replica."""
        self.beats[worker] = time.monotonic()

    def lost(self, seconds: float) -> list[str]:
        """Return the replicas without a heartbeat for more than `seconds`. Reports each replica once."""
        now = time.monotonic()
        gone = [worker for worker, last in self.beats.items() if now - last > seconds]
        for worker in gone:
            del self.beats[worker]
        return gone

    def set_worker(self, worker: str, state: WorkerState, message: str = "") -> None:
        """Record the state of a replica."""
        self.beat(worker)
        self.store.set_worker(worker, state, message)

    def claim(self, worker: str) -> tuple[Job, Files] | None:
        """Assign the next job to the replica, and return the job with its uploads."""
        self.beat(worker)
        job = self.store.claim(worker)
        if job is None:
            return None
        return job, read_files(self.folders.of(job.id) / "inputs")

    def advance(self, job: Job, step: int, steps: int) -> None:
        """Record that `step` of `steps` denoising steps are done."""
        self.store.advance(job, step, steps)

    def add_notes(self, job: Job, notes: Sequence[str]) -> None:
        """Store notes on the request for the user."""
        self.store.add_notes(job, notes)

    def should_continue(self, job: Job) -> bool:
        """Return whether the job still belongs to the replica and is not cancelled."""
        return self.store.should_continue(job)

    def finish(self, job: Job, files: Files, error: Mapping[str, str] | None) -> bool:
        """Store the results of a job. Returns False if the job no longer belongs to this replica."""
        if not self.store.should_continue(job):
            return False
        if error is None:
            write_files(self.folders.of(job.id), files)
        return self.store.finish(job, error)


class RemoteQueue:
    """A `WorkerQueue` on the server's machine. The files of a job in progress are in a local folder."""

    def __init__(self, queue: Any, folders: JobFolders) -> None:
        """`queue`: the Ray handle of the `Queue` actor."""
        self.queue, self.folders = queue, folders

    def claim(self, worker: str) -> Job | None:
        """Claim the next job, and write its uploads to the local folder."""
        found = self._ask("claim", worker)
        if found is None:
            return None
        job: Job = found[0]
        self.folders.remove(job.id)
        (self.folders.of(job.id) / "inputs").mkdir(parents=True)
        write_files(self.folders.of(job.id) / "inputs", found[1])
        return job

    def advance(self, job: Job, step: int, steps: int) -> None:
        """Record that `step` of `steps` denoising steps are done."""
        self._ask("advance", job, step, steps)

    def add_notes(self, job: Job, notes: Sequence[str]) -> None:
        """Store notes on the request for the user."""
        self._ask("add_notes", job, list(notes))

    def should_continue(self, job: Job) -> bool:
        """Return whether the job still belongs to the worker and is not cancelled."""
        return bool(self._ask("should_continue", job))

    def finish(self, job: Job, error: Mapping[str, str] | None = None) -> bool:
        """Send the results to the server, and delete the local folder."""
        files = {} if error is not None else read_files(self.folders.of(job.id), without=_SERVER_ENTRIES)
        kept = bool(self._ask("finish", job, files, error))
        self.folders.remove(job.id)
        return kept

    def set_worker(self, worker: str, state: WorkerState, message: str = "") -> None:
        """Record the state of a worker."""
        self._ask("set_worker", worker, state, message)

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self.queue, method).remote(*arguments))


class Replica:
    """The Ray Serve deployment: it loads the models, then processes jobs until Ray stops it."""

    def __init__(self, settings: Mapping[str, Any], template: Mapping[str, Any], queue: Any) -> None:
        """`settings`: the content of the worker's settings file. Raises the errors of loading the models."""
        import ray
        import torch

        from mindspeed_mm.serve.worker import open_worker

        torch.set_grad_enabled(False)
        context = ray.get_runtime_context()
        self.name = f"ray.{context.get_node_id()[:8]}.{context.get_actor_id()}"
        self._folder = tempfile.TemporaryDirectory(prefix="vace_replica_")
        here = Path(self._folder.name)
        store = RemoteQueue(queue, JobFolders(here))
        store.set_worker(self.name, "loading")
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, args=(queue,), daemon=True).start()
        write_json(here / "template.json", {**template, "output_path": str(here)})
        try:
            settings = {**settings, "template": str(here / "template.json")}
            self._worker = open_worker(settings, store, store.folders, self.name)
        except Exception as error:
            store.set_worker(self.name, "failed", " ".join(str(error).split())[:500])
            raise
        store.set_worker(self.name, "ready")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __call__(self) -> str:
        """Return the name of the replica."""
        return self.name

    def check_health(self) -> None:
        """Raise RuntimeError if the worker thread has exited. Ray then replaces the replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker thread has exited")

    def _work(self) -> None:
        try:
            self._worker.run()
        finally:
            self._stopped.set()  # without heartbeats, the server queues the job again

    def _beat(self, queue: Any) -> None:
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            with suppress(Exception):  # Ray stops this replica if the server is gone
                queue.beat.remote(self.name)


def read_files(folder: Path, *, without: frozenset[str] = frozenset()) -> Files:
    """Read every file in `folder`, except those under the top-level entries in `without`."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder): path for path in paths}
    return {str(name): path.read_bytes() for name, path in names.items() if name.parts[0] not in without}


def write_files(folder: Path, files: Files) -> None:
    """Write each file atomically."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            draft.write_bytes(content)
