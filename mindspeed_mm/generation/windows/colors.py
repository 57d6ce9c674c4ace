"""Computes Lab colour statistics of frames, and matches the colours of frames to them. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [T, H, W, 3]
Region = NDArray[np.bool_]  # [T, H, W], the pixels to use
_GAIN = 2.0  # maximum scaling of a deviation, so that noise in flat frames is not amplified
_FEWEST = 64  # minimum number of pixels for statistics


@dataclass(frozen=True)
class LabStats:
    """The mean and standard deviation of L, a and b, each fp64 [3]. L ranges from 0 to 100."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    def distance(self, other: LabStats) -> float:
        """Return the distance between the means, as ΔE76 between two colours."""
        return float(np.linalg.norm(self.mean - other.mean))


def to_lab(frame: Frames) -> NDArray[np.float32]:
    """Convert uint8 RGB [H, W, 3] to fp32 Lab."""
    return np.asarray(cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2Lab), dtype=np.float32)


def lab_stats(frames: Iterable[Frames], region: Iterable[NDArray[np.bool_]] | None = None) -> LabStats | None:
    """Return statistics of frames [H, W, 3], or of the pixels in `region`; None if there are too few."""
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    regions = iter(region) if region is not None else None
    for frame in frames:
        inside = next(regions) if regions is not None else None
        lab = to_lab(frame)
        pixels = (lab.reshape(-1, 3) if inside is None else lab[inside]).astype(np.float64)
        count += len(pixels)
        total += pixels.sum(0)
        squares += (pixels**2).sum(0)
    if count < _FEWEST:
        return None
    mean = total / count
    return LabStats(mean, np.sqrt(np.maximum(squares / count - mean**2, 0)))


def match(frames: Frames, found: LabStats, wanted: LabStats) -> Frames:
    """Change `frames`, whose statistics are `found`, to the mean and deviation of `wanted`."""
    gain = np.where(found.deviation > 0, wanted.deviation / np.maximum(found.deviation, 1e-9), 1.0)
    gain = np.clip(gain, 1 / _GAIN, _GAIN)
    offset = wanted.mean - gain * found.mean
    matched = np.empty_like(frames)
    for index, frame in enumerate(frames):
        lab = (to_lab(frame) * gain + offset).astype(np.float32)
        rgb = cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)
        matched[index] = np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    return matched
