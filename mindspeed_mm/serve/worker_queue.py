"""WorkerQueue: what a worker needs of the queue, wherever that is. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mindspeed_mm.serve.queue_file import Job, WorkerState


class WorkerQueue(Protocol):
    """The queue's own file (`JobStore`), or a server's on another machine (`RemoteQueue`)."""

    def claim(self, worker: str) -> Job | None:
        """The next job, now in progress and of this worker; None when none waits."""

    def advance(self, job: Job, step: int, steps: int) -> None:
        """Note that `step` of `steps` are done."""

    def remark(self, job: Job, notes: Sequence[str]) -> None:
        """Keep what the user should know about the request, in place of what was known before."""

    def should_continue(self, job: Job) -> bool:
        """Whether the worker should continue."""

    def finish(self, job: Job, error: Mapping[str, str] | None = None) -> bool:
        """The video is there, or failed with `error`. False when the job is no longer this worker's."""

    def set_worker(self, worker: str, state: WorkerState, message: str = "") -> None:
        """Note what a worker does."""
