"""Measures the quality of windows: colour drift, and how well each continues the previous one. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.generation.windows.colors import to_lab
from mindspeed_mm.generation.windows_config import Window, WindowKeys

Frames = NDArray[np.uint8]  # [T, H, W, 3]
_FLOOR = 0.25  # minimum for the usual change, in levels of 255, so that still videos report no jumps


class Watch:
    """Measures the frames of the finished video as they pass."""

    def __init__(self) -> None:
        self.colors: list[NDArray[np.float64]] = []  # mean Lab of each frame, [3]
        self.changes: list[float] = []  # mean difference from the previous frame, in levels
        self._last: Frames | None = None

    def watched(self, chunks: Iterable[Frames]) -> Iterator[Frames]:
        """Yield the same chunks [t, H, W, 3]. Each call starts over."""
        self.colors, self.changes, self._last = [], [], None
        for chunk in chunks:
            for frame in chunk:
                self.colors.append(to_lab(frame).reshape(-1, 3).astype(np.float64).mean(0))
                if self._last is not None:
                    change = np.abs(frame.astype(np.int16) - self._last.astype(np.int16)).mean()
                    self.changes.append(float(change))
                self._last = frame
            yield chunk


def report(keys: WindowKeys, watch: Watch, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of a video. `parts` has what is already known about each window.

    `lab_drift` is the distance of a window's mean Lab from that of the first window. `seam_jump` is the
    largest change between two frames where windows meet, relative to the median change elsewhere.
    `seam_psnr` compares the two versions of the frames that windows share.
    """
    windows = keys.windows
    seams = [_seam(window) for window in windows]
    within = [
        change for index, change in enumerate(watch.changes) if not any(index in seam for seam in seams)
    ]
    usual = max(_FLOOR, float(np.median(within)) if within else 0.0)
    first = np.mean(watch.colors[windows[0].frames], axis=0)
    rows = []
    for window, seam, part in zip(windows, seams, parts, strict=True):
        color = np.mean(watch.colors[window.frames], axis=0)
        jump = max((watch.changes[index] for index in seam), default=None)
        rows.append(
            {
                "window": window.index,
                "frames": [window.start, window.stop - 1],
                "shared": window.lead,
                **part,
                "lab_drift": round(float(np.linalg.norm(color - first)), 3),
                "seam_jump": None if jump is None else round(jump / usual, 3),
            }
        )
    known = [row["seam_psnr"] for row in rows if row.get("seam_psnr") is not None]
    return {
        "mode": keys.window_mode,
        "max_lab_drift": max(row["lab_drift"] for row in rows),
        "max_seam_jump": max(
            (row["seam_jump"] for row in rows if row["seam_jump"] is not None), default=None
        ),
        "min_seam_psnr": min(known, default=None),
        "windows": rows,
    }


def _seam(window: Window) -> range:
    """Return the indices of the frame changes where a window meets the previous one."""
    return range(window.start - 1, window.start + window.lead) if window.index else range(0)
