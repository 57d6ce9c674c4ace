"""Writing features behind the encoding.

A thread of its own, and what is known of a row once its file is there.
"""

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


class Writer:
    """Writes features in a thread of its own, a few at a time in memory. A context manager."""

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._open: list[tuple[Path, Future[None], Finished]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def write(self, path: Path, feature: FeatureRecord, metadata: Mapping[str, str], done: Finished) -> None:
        """Queue one file; wait first when too many are queued."""
        while sum(not future.done() for _, future, _ in self._open) >= self._most:
            next(future for _, future, _ in self._open if not future.done()).result()
        self._open.append((path, self._pool.submit(_write, path, feature, metadata), done))

    def is_pending(self, path: Path) -> bool:
        """Whether the file is queued or being written."""
        return any(path == other for other, _, _ in self._open)

    def wait_for(self, path: Path) -> None:
        """Until the file is written, if it is queued."""
        for other, future, _ in self._open:
            if other == path:
                future.result()

    def finished(self, *, all_of_them: bool = False) -> list[Finished]:
        """Rows whose files are on disk by now, in the order they were queued.

        Raises DataError when writing failed.
        """
        ready: list[Finished] = []
        while self._open and (all_of_them or self._open[0][1].done()):
            _, future, done = self._open.pop(0)
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
            fix="free some space and start again; finished clips are kept",
        ) from None
