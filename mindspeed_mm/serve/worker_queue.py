"""WorkerQueue: the interface between a worker and the queue. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mindspeed_mm.serve.queue_file import Job, WorkerState


class WorkerQueue(Protocol):
    """A queue in a local file (`JobStore`), or on the server's machine (`RemoteQueue`)."""

    def claim(self, worker: str) -> Job | None:
        """Assign the next queued job to this worker and return it, or None if no job is queued."""

    def advance(self, job: Job, step: int, steps: int) -> None:
        """Record that `step` of `steps` denoising steps are done."""

    def add_notes(self, job: Job, notes: Sequence[str]) -> None:
        """Store notes on the request for the user. They replace earlier notes."""

    def should_continue(self, job: Job) -> bool:
        """Return whether the job still belongs to the worker and is not cancelled."""

    def finish(self, job: Job, error: Mapping[str, str] | None = None) -> bool:
        """Mark the job as completed, or as failed with `error`.

        Returns False if the job no longer belongs to this worker.
        """

    def set_worker(self, worker: str, state: WorkerState, message: str = "") -> None:
        """Record the state of a worker."""
