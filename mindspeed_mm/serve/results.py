"""Draws the thumbnail and the sprite sheet of a finished video. Does not import torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mindspeed_mm.data.sheet import spread
from mindspeed_mm.data.video import open_video
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.files import atomic_path

_THUMBNAIL = 320  # length of the longer side in pixels
_TILE = 192
_COLUMNS, _ROWS = 4, 4


def thumbnail(video: Path) -> Path:
    """Return the middle frame as a WebP file next to `video`. The first call writes the file."""
    path = video.with_suffix(".thumbnail.webp")
    if not path.exists():
        reader = open_video(video)
        image = Image.fromarray(reader.read([reader.num_frames // 2])[0])
        image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        with atomic_path(path) as draft:
            image.save(draft, format="WEBP", quality=85)
    return path


def spritesheet(video: Path) -> Path:
    """Return up to 16 frames, from first to last, in rows of 4, as a JPEG file next to `video`."""
    path = video.with_suffix(".sprites.jpg")
    if not path.exists():
        reader = open_video(video)
        frames = reader.read(spread(reader.num_frames, _COLUMNS * _ROWS))
        tiles = []
        for frame in frames:
            tile = Image.fromarray(frame)
            tile.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
            tiles.append(np.asarray(tile))
        height, width = tiles[0].shape[:2]
        columns = min(_COLUMNS, len(tiles))
        rows = -(-len(tiles) // columns)
        sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
        for index, pixels in enumerate(tiles):
            top, left = index // columns * height, index % columns * width
            sheet[top : top + height, left : left + width] = pixels
        with atomic_path(path) as draft:
            Image.fromarray(sheet).save(draft, format="JPEG", quality=85)
    return path


def keep_tail(video: Path, frames: int, folder: Path) -> Path:
    """Write the last `frames` frames of a clip, or all if it has fewer, as a lossless clip in `folder`."""
    reader = open_video(video)
    first = max(0, reader.num_frames - frames)
    indices = range(first, reader.num_frames)
    return write_video(
        folder / "first_frame_0.mkv",
        (reader.read([index])[0] for index in indices),
        reader.fps,
        lossless=True,
    )
