"""Luma and line drawings of a frame. Each function is pure: uint8 RGB [H, W, 3] → uint8 RGB [H, W, 3]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import Frame, as_rgb, opencv


def gray(frame: Frame, *, official: bool = False) -> Frame:
    """Return the luma in three channels.

    With `official`, the weights of R and B are swapped, as in the published tool.
    """
    return as_rgb(_luma(frame, official=official))


def canny(frame: Frame, low: float = 100, high: float = 200) -> Frame:
    """Draw Canny edges in white on black. `low` and `high` are the gradient thresholds."""
    return as_rgb(np.asarray(opencv().Canny(_luma(frame), low, high)))


def edge(frame: Frame) -> Frame:
    """Draw edges in white on black, linked into chains by EdgeDrawing."""
    drawing = opencv().ximgproc.createEdgeDrawing()
    drawing.detectEdges(np.ascontiguousarray(_luma(frame)))
    return as_rgb(np.asarray(drawing.getEdgeImage()))


def xdog(
    frame: Frame,
    sigma: float = 0.8,
    k: float = 1.6,
    tau: float = 0.98,
    epsilon: float = 0.0,
    phi: float = 200,
) -> Frame:
    """Draw the extended difference of Gaussians as black strokes on white.

    With D = G(sigma) - tau * G(k * sigma) of the luma in [0, 1], a pixel is 1 where D >= epsilon, otherwise
    1 + tanh(phi * (D - epsilon)).
    """
    cv2 = opencv()
    luma = _luma(frame).astype(np.float32) / 255
    narrow = cv2.GaussianBlur(luma, (0, 0), sigma)
    wide = cv2.GaussianBlur(luma, (0, 0), k * sigma)
    difference = narrow - tau * wide - epsilon
    response = np.where(difference >= 0, 1.0, 1 + np.tanh(phi * difference))
    return as_rgb((response * 255).round().clip(0, 255).astype(np.uint8))


def scribble(frame: Frame) -> Frame:
    """Draw black strokes on white, like the scribbles that the weights were trained on.

    The strokes come from a coarse `xdog`, with small specks removed.
    """
    cv2 = opencv()
    strokes = np.where(xdog(frame, sigma=1.4)[..., 0] < 128, 255, 0).astype(np.uint8)
    count, labels, facts, _ = cv2.connectedComponentsWithStats(strokes, connectivity=8)
    min_area = max(8, round(0.02 * min(frame.shape[:2])))
    shade = np.full(count, 255, np.uint8)
    shade[1:] = np.where(facts[1:, cv2.CC_STAT_AREA] >= min_area, 0, 255)
    return as_rgb(shade[labels])


def _luma(frame: Frame, *, official: bool = False) -> NDArray[np.uint8]:
    cv2 = opencv()
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY if official else cv2.COLOR_RGB2GRAY))
