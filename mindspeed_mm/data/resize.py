"""Resizes frames to the model's size as in VACE's training.

Clips are resized to fill (bicubic with antialias, on uint8) and center-cropped. Masks are resized to the
nearest pixel and binarized at one half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from mindspeed_mm.data.images import Frames, brightness, reject_zero_one
from mindspeed_mm.data.video import VideoReader

Resize = Callable[[Frames, int, int], Frames]  # frames [T, h, w, 3], height, width → [T, H, W, …]
Size = tuple[int, int]  # height, width
_AT_ONCE = 8  # frames of the source's size in memory while a clip is read


def read_resized(reader: VideoReader, indices: Sequence[int], size: Size, resize: Resize) -> Frames:
    """Read the frames at `indices` and resize them to `size` (height, width).

    Reads a few frames at a time, so that a long 4K clip needs little memory.
    """
    unique = sorted(set(indices))
    parts = [resize(reader.read(unique[i : i + _AT_ONCE]), *size) for i in range(0, len(unique), _AT_ONCE)]
    frames = np.concatenate(parts)
    position = {index: i for i, index in enumerate(unique)}
    return frames if list(indices) == unique else frames[[position[index] for index in indices]]


def resize_to_fill(frames: Frames, height: int, width: int) -> Frames:
    """Scale frames [T, h, w, 3] until they cover the target, and center-crop them to [T, H, W, 3].

    Bicubic with antialias, on uint8.
    """
    scaled = _scaled_size(frames, height, width)
    if frames.shape[1:3] != scaled:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        pixels = interpolate(pixels, size=scaled, mode="bicubic", antialias=True, align_corners=False)
        frames = pixels.permute(0, 2, 3, 1).numpy()
    return _centre(frames, height, width)


def resize_mask(frames: Frames, height: int, width: int) -> NDArray[np.uint8]:
    """Convert mask frames [T, h, w, 3] to brightness [T, H, W], scaled and cropped as by `resize_to_fill`.

    Each pixel takes the value of the nearest source pixel.
    """
    gray = brightness(frames)
    rows, columns = _scaled_size(frames, height, width)
    y = np.arange(rows) * gray.shape[1] // rows
    x = np.arange(columns) * gray.shape[2] // columns
    return _centre(gray[:, y][:, :, x], height, width)


def binarize(
    mask: NDArray[np.uint8], path: Path | str = "(frames)", *, soft: bool = False
) -> NDArray[np.uint8]:
    """Set mask values above one half to 255 and all others to 0; `soft` keeps them as they are.

    Raises DataError for a mask with values 0 and 1 instead of 0 and 255.
    """
    reject_zero_one(path, int(mask.max(initial=0)))
    return mask if soft else np.where(mask > 127, 255, 0).astype(np.uint8)


def _scaled_size(frames: Frames, height: int, width: int) -> tuple[int, int]:
    rows, columns = frames.shape[1:3]
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def _centre(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])
