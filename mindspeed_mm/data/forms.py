"""Converts clips and images in any form: paths, tensors, arrays and Pillow images.

Values outside their range raise an error and are never clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mindspeed_mm.data.images import BLACK, WHITE, Frames, flatten
from mindspeed_mm.data.sample import Clip, Picture
from mindspeed_mm.data.video import VideoReader, open_video
from mindspeed_mm.errors import DataError

Reader = Literal["decord", "av"]
_ROUNDING = 1e-3  # how far pixels may exceed their range


def as_reader(clip: Clip | VideoReader, reader: Reader = "av", *, mask: bool = False) -> VideoReader:
    """Return a reader for a clip in any form. Raises DataError if it is not a valid clip."""
    if isinstance(clip, (str, Path)):
        return open_video(clip, reader, mask=mask)
    if isinstance(clip, Tensor):
        return ArrayReader(_tensor_bytes(clip))
    if isinstance(clip, np.ndarray):
        return ArrayReader(_array_bytes(clip))
    if isinstance(clip, (Image.Image, Sequence)):
        images: Sequence[Any] = [clip] if isinstance(clip, Image.Image) else clip
        return ArrayReader(np.stack([flatten(image, BLACK if mask else WHITE) for image in images]))
    return clip


def as_image(image: Picture) -> str | Path | Image.Image | Frames:
    """Convert a reference image in a tensor or array to bytes; return paths and Pillow images unchanged."""
    if isinstance(image, Tensor):
        pixels: Frames = _tensor_bytes(image if image.ndim == 4 else image[:, None])[0]
        return pixels
    if isinstance(image, np.ndarray):
        first: Frames = _array_bytes(image)[0]
        return first
    return image


def checked_values(clip: Tensor) -> Tensor:
    """Convert to fp32 on the CPU.

    Raises DataError for values out of range, such as bytes in 0 to 255, which would all become white.
    """
    values = clip.detach().cpu().float()
    low = -1 if clip.shape[0] == 3 else 0
    _check_range(float(values.min()), float(values.max()), low, "tensor")
    return values


def _check_range(smallest: float, largest: float, low: int, kind: str) -> None:
    if not (smallest >= low - _ROUNDING and largest <= 1 + _ROUNDING):  # negated, so that NaN raises too
        raise DataError(
            f"a clip {kind} has values from {smallest:g} to {largest:g}",
            expected=f"{low} to 1, or an array of bytes",
        )


def _tensor_bytes(clip: Tensor) -> NDArray[np.uint8]:
    """Convert [3, T, H, W] in [-1, 1], or a mask [1, T, H, W] in [0, 1], to uint8 [T, H, W, 3]."""
    if clip.ndim != 4 or clip.shape[0] not in (1, 3):
        raise DataError(
            f"got a clip tensor of {list(clip.shape)}",
            expected="[3, T, H, W] in [-1, 1], or a mask [1, T, H, W] in [0, 1]",
        )
    values = checked_values(clip)
    values = values * 255 if clip.shape[0] == 1 else (values + 1) * 127.5
    return values.round().clamp(0, 255).byte().expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().numpy()


def _array_bytes(clip: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert [T, H, W, 3], [T, H, W] or [H, W, 3] of bytes, booleans or floats in [0, 1].

    Returns uint8 [T, H, W, 3].
    """
    if clip.dtype != np.uint8:
        _check_range(float(clip.min()), float(clip.max()), 0, "array")
        clip = (np.asarray(clip, dtype=np.float64) * 255).round().clip(0, 255).astype(np.uint8)
    if clip.ndim == 3 and clip.shape[-1] == 3:
        clip = clip[None]
    return np.repeat(clip[..., None], 3, axis=-1) if clip.ndim == 3 else clip


class ArrayReader:
    """A VideoReader for frames in memory."""

    timed = False
    traits: tuple[str, ...] = ()

    def __init__(self, frames: Frames) -> None:
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise DataError(f"frames have shape {list(frames.shape)}", expected="[T, H, W, 3]")
        self._frames = frames
        self.path = Path("(frames)")
        self.num_frames, self.height, self.width = frames.shape[:3]
        self.fps = 16.0
        self.times = [i / self.fps for i in range(self.num_frames)]
        self.duration = self.num_frames / self.fps

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at `indices`, uint8 [T, H, W, 3]."""
        return self._frames[list(indices)]
