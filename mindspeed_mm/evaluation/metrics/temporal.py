"""Measures changes between the frames of a video.

These are flicker, motion, changes that motion does not explain, and jumps between latent frames.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.flow import Flow
from mindspeed_mm.conditioning.annotate.opencv import Frame, opencv
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.spec import metric
from mindspeed_mm.geometry import WAN

_OFF = 1.0  # maximum disagreement of forward and backward flow, in pixels


@metric(
    "flicker", unit="levels", better="lower", summary="distance of each frame from the mean of its neighbours"
)
def flicker(sample: Sample) -> float | None:
    """Return the mean over pixels and inner frames. A linear change counts as 0."""
    frames = sample.output
    if len(frames) < 3:
        return None
    found = [
        np.abs(2 * frames[n].astype(np.float32) - frames[n - 1] - frames[n + 1]).mean() / 2
        for n in range(1, len(frames) - 1)
    ]
    return float(np.mean(found))


@metric(
    "warp_error",
    unit="levels",
    better="lower",
    summary="change between frames that motion does not explain",
)
def warp_error(sample: Sample) -> float | None:
    """Compare each frame with the next one, warped back along the flow, where both flows agree."""
    errors = [
        error
        for n, (there, back) in enumerate(zip(sample.forward_flow, sample.backward_flow, strict=True))
        if (error := _warp_error(sample.output[n], sample.output[n + 1], there, back)) is not None
    ]
    return float(np.mean(errors)) if errors else None


@metric("motion", unit="px", better="", summary="mean length of the optical flow between two frames")
def motion(sample: Sample) -> float | None:
    """Return the mean over all pixels."""
    if not sample.forward_flow:
        return None
    return float(np.mean([np.hypot(flow[..., 0], flow[..., 1]).mean() for flow in sample.forward_flow]))


@metric(
    "latent_jump",
    unit="x",
    better="lower",
    summary="change at a new latent frame, as a multiple of other changes",
)
def latent_jump(sample: Sample) -> float | None:
    """Compare every fourth change with the others, because four frames share a latent frame. 1 = no jump."""
    frames = sample.output
    changes = [
        float(np.abs(frames[n].astype(np.int16) - frames[n - 1]).mean()) for n in range(1, len(frames))
    ]
    first = changes[:: WAN.stride[0]]
    others = [change for n, change in enumerate(changes) if n % WAN.stride[0]]
    if not others or np.mean(others) == 0:
        return None
    return float(np.mean(first) / np.mean(others))


def _warp_error(frame: Frame, following: Frame, there: Flow, back: Flow) -> float | None:
    cv2 = opencv()
    height, width = frame.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = columns + there[..., 0], rows + there[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    returned: NDArray[np.float32] = cv2.remap(back, x, y, cv2.INTER_LINEAR)
    missed = np.hypot(there[..., 0] + returned[..., 0], there[..., 1] + returned[..., 1])
    seen = inside & (missed <= _OFF)
    if not seen.any():
        return None
    warped = np.asarray(cv2.remap(following.astype(np.float32), x, y, cv2.INTER_LINEAR))
    return float(np.abs(warped - frame)[seen].mean())
