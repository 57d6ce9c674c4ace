"""The crossfade between two windows. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ramp(count: int) -> NDArray[np.float32]:
    """fp32 [count], rising linearly between 0 and 1: the weight of the later window in shared frames."""
    return (np.arange(1, count + 1) / (count + 1)).astype(np.float32)
