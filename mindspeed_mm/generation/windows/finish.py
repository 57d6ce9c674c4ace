"""Finishes decoded frames: pastes kept pixels back, and measures windows. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.generation.windows.paste import paste_chunks
from mindspeed_mm.generation.windows.report import Watch, report
from mindspeed_mm.generation.windows_config import WindowKeys
from mindspeed_mm.generation.writer import Frames, clip_bytes, mask_bytes

Chunks = Callable[[], Iterator[Frames]]  # frames [t, H, W, 3]; each call restarts at the first frame


def finished_chunks(
    decode: Chunks, keys: WindowKeys, conditions: Conditions
) -> tuple[Chunks, Callable[[], dict[str, Any]]]:
    """Return the finished frames of a video, and a function that reports on it once they are consumed.

    The report is {} for a video of one window.
    """
    watch = Watch()

    def chunks() -> Iterator[Frames]:
        found = decode()
        if (
            keys.paste_back is not None
            and conditions.src_video is not None
            and conditions.src_mask is not None
        ):
            source, mask = clip_bytes(conditions.src_video), mask_bytes(conditions.src_mask)
            found = paste_chunks(found, source, mask, keys.paste_back)
        yield from watch.watched(found) if keys.is_windowed else found

    def measured() -> dict[str, Any]:
        if not keys.is_windowed or not watch.colors:
            return {}
        return report(keys, watch, [{} for _ in keys.windows])

    return chunks, measured
