"""How one window fades into the next. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ramp(count: int) -> NDArray[np.float32]:
    """fp32 [count], rising linearly within 0 and 1: how much the later window counts in what two share."""
    return (np.arange(1, count + 1) / (count + 1)).astype(np.float32)
