"""Writes features in a background thread while the next clips are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm.data.features import write_feature
from mindspeed_mm.data.sample import FeatureRecord, SampleRecord
from mindspeed_mm.errors import MindSpeedMMError


@dataclass(frozen=True)
class Finished:
    """A row whose feature is on disk."""

    record: SampleRecord
    key: str
    shape: tuple[int, int, int]
    num_refs: int
    fresh: bool  # encoded in this run


class FeatureWriter:
    """Context manager that writes features in a background thread.

    At most `max_pending` features are queued or being written.
    """

    def __init__(self, max_pending: int = 2) -> None:
        self._max_pending = max_pending
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._queue: list[tuple[Path, Future[None], Finished]] = []

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def write(self, path: Path, feature: FeatureRecord, metadata: Mapping[str, str], done: Finished) -> None:
        """Queue one file. Blocks while the queue is full."""
        while sum(not future.done() for _, future, _ in self._queue) >= self._max_pending:
            next(future for _, future, _ in self._queue if not future.done()).result()
        self._queue.append((path, self._pool.submit(_write, path, feature, metadata), done))

    def is_pending(self, path: Path) -> bool:
        """Return whether the file is queued or being written."""
        return any(path == other for other, _, _ in self._queue)

    def wait_for(self, path: Path) -> None:
        """Block until the file is written, if it is queued."""
        for other, future, _ in self._queue:
            if other == path:
                future.result()

    def finished(self, *, wait: bool = False) -> list[Finished]:
        """Return rows whose files are on disk, in queue order, each row once.

        `wait` blocks until all queued files are written. Raises MindSpeedMMError if a write failed.
        """

        ready: list[Finished] = []
        while self._queue and (wait or self._queue[0][1].done()):
            _, future, done = self._queue.pop(0)
            future.result()
            ready.append(done)
        return ready


def _write(path: Path, feature: FeatureRecord, metadata: Mapping[str, str]) -> None:
    try:
        write_feature(path, feature, metadata)
    except OSError as error:
        raise MindSpeedMMError(
            f"cannot be written: {error}",
            where=path,
            fix="free disk space and run the command again; finished clips are kept",
        ) from None
