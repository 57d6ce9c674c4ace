"""Assembles a video window by window. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.data.psnr import region_psnr
from mindspeed_mm.generation.windows.colors import LabStats, lab_stats, match
from mindspeed_mm.generation.windows.paste import paste_frame
from mindspeed_mm.generation.windows.ramp import ramp
from mindspeed_mm.generation.windows.report import Watch, report
from mindspeed_mm.generation.windows_config import Window, WindowKeys

Frames = NDArray[np.uint8]  # [T, H, W, 3]
Masks = NDArray[np.uint8]  # [T, H, W], above 127 = generated


class Composition:
    """The frames so far. All pixels are uint8, as a resumed run reads them."""

    def __init__(
        self, keys: WindowKeys, size: tuple[int, int], video: Frames | None, mask: Masks | None
    ) -> None:
        """`size` is (height, width). `mask` [T, H, W] selects where colours are compared; None = everywhere.

        `video` is src_video [T, H, W, 3]; `paste_back` copies its pixels.
        """
        self.keys, self.video, self.mask = keys, video, mask
        self.frames: Frames = np.zeros((keys.num_frames, *size, 3), np.uint8)
        self.parts: list[dict[str, Any]] = []
        self._first: LabStats | None = None

    def lead(self, window: Window) -> Frames:
        """Return the earlier frames [lead, H, W, 3] that a window starts with and keeps."""
        return self.frames[window.start : window.start + window.lead]

    def add(self, window: Window, made: Frames) -> None:
        """Add the frames of a window: match their colours, and crossfade the shared frames."""
        lead, start = window.lead, window.start
        stop = len(made) if window.stop == self.keys.num_frames else len(made) - self.keys.window_discard
        made = made[:stop]
        shared = self.lead(window)
        region = None if self.mask is None else self.mask[start : start + stop] > 127
        found = lab_stats(made, region)
        if self._first is None:
            self._first = found
        elif self.keys.window_colors == "first" and found is not None:
            made = match(made, found, self._first)
        likeness = region_psnr(zip(shared, made[:lead], strict=True))
        drift = None if found is None or self._first is None else found.distance(self._first)
        self.parts.append(
            {
                "lab_drift_before_matching": None if drift is None else round(drift, 3),
                "seam_psnr": None if likeness is None else round(likeness, 2),
            }
        )
        weights = ramp(lead)[:, None, None, None]
        faded = shared * (1 - weights) + made[:lead] * weights
        self.frames[start : start + lead] = np.rint(faded).astype(np.uint8)
        self.frames[start + lead : start + stop] = made[lead:]
        self._paste(range(start, start + stop))

    def _paste(self, span: range) -> None:
        """Restore kept pixels from the source, so that the next window continues from them."""
        if self.keys.paste_back is None or self.video is None or self.mask is None:
            return
        for index in span:
            self.frames[index] = paste_frame(
                self.frames[index], self.video[index], self.mask[index], self.keys.paste_back
            )

    def report(self) -> dict[str, Any]:
        """Return the colour drift and the seams of the whole video."""
        watch = Watch()
        for _ in watch.watched([self.frames]):
            pass
        return report(self.keys, watch, self.parts)
