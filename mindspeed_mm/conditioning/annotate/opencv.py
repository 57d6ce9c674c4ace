"""Lazy import of OpenCV, and the array types that annotators work on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.errors import ConfigError

Frame = NDArray[np.uint8]  # [H, W, 3], RGB
Mask = NDArray[np.uint8]  # [H, W], 255 = generate, 0 = keep
Box = tuple[float, float, float, float]  # left, top, right, bottom; right and bottom are exclusive
Frames = Callable[[], Iterator[Frame]]  # each call iterates over the clip from the start

GRAY = 128  # value of a missing pixel in a file; 0 in tensors in [-1, 1]
_CONTRIB = ("TrackerCSRT_create", "ximgproc", "saliency")


@functools.cache
def opencv() -> Any:
    """Import and return `cv2`. Raises ConfigError if it is missing or lacks the contrib modules."""
    fix = "pip install opencv-contrib-python-headless"
    try:
        import cv2
    except ImportError:
        raise ConfigError("OpenCV is not installed", fix=fix) from None
    lacking = [name for name in _CONTRIB if not hasattr(cv2, name)]
    if lacking:
        raise ConfigError(
            f"OpenCV {cv2.__version__} lacks {', '.join(lacking)}",
            expected="OpenCV with its contrib modules",
            fix=f"pip uninstall opencv-python opencv-python-headless, then {fix}",
        )
    return cv2


def as_rgb(values: NDArray[np.uint8]) -> Frame:
    """Repeat one channel [H, W] as RGB [H, W, 3]."""
    return np.repeat(values[..., None], 3, axis=-1)


def erase(frame: Frame, mask: Mask) -> Frame:
    """Return a copy of `frame` that is gray where `mask` is white."""
    return np.where(mask[..., None] > 127, np.uint8(GRAY), frame)


def gray_frame(height: int, width: int) -> Frame:
    """Return a frame of missing pixels."""
    return np.full((height, width, 3), GRAY, np.uint8)


def whole_mask(height: int, width: int, *, generate: bool) -> Mask:
    """Return a mask with a single value: white to generate, black to keep."""
    return np.full((height, width), 255 if generate else 0, np.uint8)
