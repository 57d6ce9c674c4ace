"""Temporary disk storage for per-frame arrays that are read more than once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Spool:
    """Context manager that stores arrays of one shape and dtype on disk and reads them back in order.

    The temporary file is anonymous.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._shape: tuple[int, ...] = ()
        self._dtype: np.dtype[Any] = np.dtype(np.float32)
        self.count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, values: NDArray[Any]) -> None:
        """Append one array."""
        self._shape, self._dtype = values.shape, values.dtype
        self._file.write(np.ascontiguousarray(values).tobytes())
        self.count += 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        self._file.seek(0)
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        for _ in range(self.count):
            yield np.frombuffer(self._file.read(size), self._dtype).reshape(self._shape)
