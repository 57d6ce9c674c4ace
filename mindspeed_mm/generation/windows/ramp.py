"""The crossfade between two windows. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ramp(count: int) -> NDArray[np.float32]:
    """Return the weights of the later window in shared frames: fp32 [count], rising linearly, in (0, 1)."""
    return (np.arange(1, count + 1) / (count + 1)).astype(np.float32)
