"""Chooses the size and length of the video for a source clip. Does not import torch or gradio."""

from __future__ import annotations

import math

from mindspeed_mm.geometry import WAN


def fit(
    size: tuple[int, int],
    frames: int,
    area: int,
    max_frames: int,
    sides: tuple[float, float, float, float] = (0,) * 4,
) -> tuple[int, int, int]:
    """Choose (width, height, frames) for a source of `size` (height, width), extended by `sides` percent.

    `sides` are left, top, right and bottom. Width and height are multiples of 16 with a product of about
    `area` pixels. The number of frames is 4k+1, and at most the smaller of `frames` and `max_frames`.
    """
    left, top, right, bottom = sides
    full_width, full_height = size[1] * (1 + (left + right) / 100), size[0] * (1 + (top + bottom) / 100)
    scale = math.sqrt(area / (full_width * full_height))
    width, height = (WAN.nearest_side(side * scale) for side in (full_width, full_height))
    count = min(frames, max_frames)
    return width, height, max(1, WAN.trim_frames(count))
