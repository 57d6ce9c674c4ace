"""Maps a function over many items in threads, to hide the latency of network file systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_THREADS = 32
# ThreadPoolExecutor.map does not chunk, and submitting a single item costs more than a local stat.
_CHUNK = 256


def map_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply `function` to every item and return the results in order. Exceptions propagate."""

    def apply(start: int) -> list[R]:
        return [function(item) for item in items[start : start + _CHUNK]]

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return [result for results in pool.map(apply, range(0, len(items), _CHUNK)) for result in results]
