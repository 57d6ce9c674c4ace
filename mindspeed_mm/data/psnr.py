"""PSNR of uint8 pixels. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BEST_PSNR = 99.0  # reported for equal pixels, whose PSNR is infinite


def psnr_of(squared_error: float) -> float:
    """Return the PSNR in dB for a mean squared error of 8-bit values."""
    return min(BEST_PSNR, 10 * math.log10(255**2 / max(squared_error, 1e-9)))


def region_psnr(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> float | None:
    """Return the PSNR in dB over the pixels of all pairs, or None if there are none."""
    count, total = 0, 0.0
    for found, expected in pairs:
        count += found.size
        total += float(np.square(found.astype(np.float32) - expected).sum(dtype=np.float64))
    return psnr_of(total / count) if count else None
