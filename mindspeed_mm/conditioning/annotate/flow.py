"""DIS optical flow, rendered in colour.

The colours follow Baker et al., "A Database and Evaluation Methodology for Optical Flow" (2011).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import Frame, Frames, opencv
from mindspeed_mm.conditioning.annotate.spool import Spool

Flow = NDArray[np.float32]  # [H, W, 2]: displacement of each pixel to the right and down, in pixels
_SECTORS = (("R", "Y", 15), ("Y", "G", 6), ("G", "C", 4), ("C", "B", 11), ("B", "M", 13), ("M", "R", 6))
_TINY = 1e-5
_STEPS = 256  # interpolation steps between two hues of the wheel


def flows(frames: Frames) -> Iterator[Flow]:
    """Yield the N - 1 flows between consecutive frames of a clip of N frames."""
    cv2 = opencv()
    # MEDIUM takes four times as long as ULTRAFAST but has a quarter of its error on a moving texture.
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    before: NDArray[np.uint8] | None = None
    for frame in frames():
        luma = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
        if before is not None:
            yield estimator.calc(before, luma, None)
        before = luma


def flow_frames(frames: Frames, *, official: bool = False) -> Iterator[Frame]:
    """Yield the flow of a clip in colour, one frame per source frame. The first flow is repeated.

    All frames are scaled by the longest vector of the clip. With `official`, each frame is scaled by its own
    longest vector, so brightness flickers. Yields nothing for a clip of one frame.
    """
    with Spool() as spool:
        longest = 0.0
        for flow in flows(frames):
            longest = max(longest, longest_vector(flow))
            spool.add(flow)
        for index, flow in enumerate(spool):
            picture = colour_flow(flow, longest_vector(flow) if official else longest)
            if index == 0:
                yield picture
            yield picture


def longest_vector(flow: Flow) -> float:
    """Return the length of the longest vector in pixels."""
    return float(opencv().magnitude(flow[..., 0], flow[..., 1]).max(initial=0))


def colour_flow(flow: Flow, radius: float) -> Frame:
    """Convert a flow [H, W, 2] to colours [H, W, 3].

    The hue encodes the direction, the saturation the length as a fraction of `radius`. White means no motion.
    """
    length, angle = opencv().cartToPolar(flow[..., 0], flow[..., 1])
    table = _hues()
    hue = table[np.rint(angle * np.float32((len(table) - 1) / (2 * np.pi))).astype(np.int32)]
    length = (length / np.float32(radius + _TINY))[..., None]
    colour = 1 - (1 - hue) * length
    outside = length[..., 0] > 1
    if outside.any():
        colour[outside] = hue[outside] * np.float32(0.75)
    return np.asarray(colour * 255, np.uint8)


@functools.cache
def _hues() -> NDArray[np.float32]:
    """Return the colour wheel for directions from 0 to 2 pi.

    The steps are fine enough that no colour is off by more than one level.
    """
    wheel = colour_wheel() / 255
    position = np.arange((len(wheel) - 1) * _STEPS + 1) / _STEPS
    low = np.floor(position).astype(np.int64)
    part = (position - low)[:, None]
    return ((1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]).astype(np.float32)


@functools.cache
def colour_wheel() -> NDArray[np.float64]:
    """Return the 55 hues [55, 3] in 0..255, from red through yellow, green, cyan, blue and magenta."""
    channel = {"R": 0, "G": 1, "B": 2}
    light = {"R": "R", "Y": "RG", "G": "G", "C": "GB", "B": "B", "M": "RB"}
    rows = []
    for first, second, count in _SECTORS:
        for step in range(count):
            row = np.zeros(3)
            ramp = np.floor(255 * step / count)
            for name in set(light[first] + light[second]):
                both = name in light[first] and name in light[second]
                row[channel[name]] = 255 if both else 255 - ramp if name in light[first] else ramp
            rows.append(row)
    return np.array(rows)
