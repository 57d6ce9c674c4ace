"""Measures how much each pixel differs from a plain backdrop, such as a wall, the sky or a studio sweep."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import Frame, opencv

_SIDE = 128  # longer side of the downscaled frame; a plain backdrop has no fine detail to lose
_EDGE = 0.05  # width of the border that the fit uses, as a fraction of the shorter side
_ROUNDS = 10  # fit iterations; each reduces the weight of a subject that touches the border
_NEAR = 4.0  # maximum distance of a backdrop pixel from the fit, in Lab units
_PLAIN = 0.7  # fraction of border pixels that must be within `_NEAR`
_FAR = 8  # the contrast reaches 1 at this multiple of the typical border error


def backdrop_contrast(frame: Frame) -> NDArray[np.float32] | None:
    """Return the contrast [H, W] in [0, 1], with 0 on the backdrop.

    Fits a plane to the Lab colours along the border by iteratively reweighted least squares. Returns None if
    the border of the frame is not a smooth gradient.
    """
    cv2 = opencv()
    height, width = frame.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(3, round(width * scale)), max(3, round(height * scale)))
    lab = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2LAB)
    lab = lab.astype(np.float64)
    rows, columns = np.meshgrid(np.linspace(-1, 1, size[1]), np.linspace(-1, 1, size[0]), indexing="ij")
    basis = np.stack([np.ones_like(rows), rows, columns], axis=-1)
    depth = max(1, round(_EDGE * min(size)))
    edge = np.ones(lab.shape[:2], bool)
    edge[depth:-depth, depth:-depth] = False
    points, colours = basis[edge], lab[edge]
    weights, usual = np.ones(len(points)), _NEAR
    plane = np.zeros((3, 3))
    for _ in range(_ROUNDS):
        weighted = points * weights[:, None]
        plane = np.linalg.lstsq(weighted.T @ points, weighted.T @ colours, rcond=None)[0]
        errors = np.linalg.norm(colours - points @ plane, axis=1)
        usual = max(_NEAR, 1.5 * float(np.median(errors)))
        weights = 1 / (1 + (errors / usual) ** 2) ** 2
    if (np.linalg.norm(colours - points @ plane, axis=1) < _NEAR).mean() < _PLAIN:
        return None
    differs = np.linalg.norm(lab - basis @ plane, axis=2) / (_FAR * usual)
    found = cv2.resize(np.clip(differs, 0, 1).astype(np.float32), (width, height), interpolation=1)
    return np.asarray(found, np.float32)
