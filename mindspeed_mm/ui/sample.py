"""A sample clip for the tiny weights, which were trained on coloured shapes that move on a gray gradient.

Does not import torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindspeed_mm.data.video_writer import write_video

PROMPT = "a blue circle moves right over a dark background"
_FRAMES, _SIDE, _FPS, _RADIUS = 17, 64, 16, 17.0
_COLOUR = (214, 42, 42)


def write_sample(folder: Path) -> Path:
    """Write a clip of a red circle that moves to the right. PROMPT makes the circle blue."""
    path = folder / "sample.mp4"
    if not path.exists():
        y, x = np.mgrid[:_SIDE, :_SIDE].astype(np.float32) + 0.5
        ground = np.repeat(np.linspace(34, 96, _SIDE, dtype=np.float32)[None, :, None], _SIDE, axis=0)
        frames = []
        for index in range(_FRAMES):
            centre = _RADIUS + 2 + index / (_FRAMES - 1) * (_SIDE - 2 * _RADIUS - 8)
            cover = np.clip(_RADIUS + 0.5 - np.hypot(x - centre, y - _SIDE / 2), 0, 1)[..., None]
            frames.append(np.rint(ground * (1 - cover) + np.array(_COLOUR) * cover).astype(np.uint8))
        write_video(path, np.stack(frames), _FPS)
    return path
