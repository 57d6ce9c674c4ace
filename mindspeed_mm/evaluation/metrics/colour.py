"""Colour drift from the beginning of a video to its end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import opencv
from mindspeed_mm.evaluation.sample import Pixels, Sample
from mindspeed_mm.evaluation.spec import metric

_PART = 4  # the first and the last quarter are compared


@metric(
    "colour_drift",
    unit="dE",
    better="lower",
    summary="mean CIELAB colour of the last quarter against the first",
)
def colour_drift(sample: Sample) -> float | None:
    """Return the length of the shift of the mean colour, minus the shift of the true clip if there is one."""
    if len(sample.output) < 2:
        return None
    moved = _moved(sample.output)
    if sample.truth is not None:
        moved = moved - _moved(sample.truth)
    return float(np.linalg.norm(moved))


def _moved(frames: Pixels) -> NDArray[np.float64]:
    count = max(1, len(frames) // _PART)
    return mean_lab(frames[-count:]) - mean_lab(frames[:count])


def mean_lab(frames: Pixels) -> NDArray[np.float64]:
    """Return the mean L, a and b of all pixels."""
    cv2 = opencv()
    means = [cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).mean((0, 1)) for frame in frames]
    return np.asarray(np.mean(means, 0), np.float64)
