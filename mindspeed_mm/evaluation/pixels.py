"""SSIM (structural similarity) of uint8 images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import Frame, opencv

SSIM_RADIUS = 5  # radius of the 11x11 window in pixels
_SIGMA, _C1, _C2 = 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim_map(found: Frame, expected: Frame) -> NDArray[np.float64]:
    """Return the SSIM of the luma at every pixel [H, W]. The window is an 11x11 Gaussian (Wang et al., 2004).

    Values closer than SSIM_RADIUS to the border use mirrored pixels.
    """
    cv2 = opencv()
    x, y = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64) for frame in (found, expected))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        side = 2 * SSIM_RADIUS + 1
        return np.asarray(cv2.GaussianBlur(values, (side, side), _SIGMA, borderType=cv2.BORDER_REFLECT))

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    both = mean(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * both + _C2)
    return np.asarray(top / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)))
