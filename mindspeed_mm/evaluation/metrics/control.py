"""Measures whether the video follows its control clip.

The annotator of the task runs on the video, and its output is compared with the control clip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import opencv
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.conditioning.tasks.spec import Clip, Sources
from mindspeed_mm.evaluation.sample import PixelMask, Pixels, Sample
from mindspeed_mm.evaluation.spec import metric

_DARK = ("scribble", "xdog")  # tasks with black strokes on white; the others draw white on black
_LINES = ("canny", "edge", *_DARK)
_DEPTHS = ("depth", "depthv2")
_POSES = ("pose", "pose_body")


def extracted(sample: Sample) -> Pixels:
    """Run the task's annotator on the output, and return its control clip.

    Raises ConfigError if the network of the task is missing.
    """
    from mindspeed_mm.data.forms import ArrayReader

    task = TASKS.get(sample.task)
    options = task.parse(sample.options, f"task {sample.task}")
    prepared = task.prepare(Sources(clips=(Clip(ArrayReader(sample.output)),)), options)
    return np.stack([frame for frame, _ in prepared.read()])


@metric("gray_error", unit="levels", better="lower", summary="luma against the control's; task gray")
def gray_error(sample: Sample) -> float | None:
    """Return the mean absolute difference."""
    if sample.src_video is None or sample.task != "gray":
        return None
    return float(np.abs(extracted(sample).astype(np.int16) - sample.src_video).mean())


@metric(
    "line_f1",
    better="higher",
    summary="lines within a pixel of the control's; tasks canny, edge, scribble, xdog",
)
def line_f1(sample: Sample) -> float | None:
    """Return the F1 score of the lines, from their precision and recall against the control clip."""
    if sample.src_video is None or sample.task not in _LINES:
        return None
    dark = sample.task in _DARK
    found, control = (frames.max(-1) for frames in (extracted(sample), sample.src_video))
    return overlap_f1(found < 128, control < 128, 1) if dark else overlap_f1(found > 127, control > 127, 1)


@metric(
    "pose_f1",
    better="higher",
    summary="skeletons within two pixels of the control's; task pose, needs its network",
)
def pose_f1(sample: Sample) -> float | None:
    """Return the same as `line_f1`, for everything that is drawn on black."""
    if sample.src_video is None or sample.task not in _POSES:
        return None
    found, control = (frames.max(-1) > 64 for frames in (extracted(sample), sample.src_video))
    return overlap_f1(found, control, 2)


@metric(
    "depth_error",
    unit="levels",
    better="lower",
    summary="depth against the control's; task depth, needs its network",
)
def depth_error(sample: Sample) -> float | None:
    """Return the mean absolute difference after the best scale and shift, because depth has no unit."""
    if sample.src_video is None or sample.task not in _DEPTHS:
        return None
    found = extracted(sample)[..., 0].astype(np.float64).ravel()
    control = sample.src_video.mean(-1, dtype=np.float64).ravel()
    spread = found.var()
    scale = ((found - found.mean()) * (control - control.mean())).mean() / spread if spread else 0.0
    return float(np.abs(control.mean() + max(scale, 0.0) * (found - found.mean()) - control).mean())


def overlap_f1(found: PixelMask, control: PixelMask, tolerance: int) -> float | None:
    """Return the F1 score of two sets of pixels. A pixel matches within a distance of `tolerance`.

    Returns None if the control has no pixels, and 0 if nothing matches.
    """
    if not control.any():
        return None
    kernel = np.ones((2 * tolerance + 1,) * 2, np.uint8)

    def near(where: PixelMask) -> NDArray[np.bool_]:
        return np.stack([opencv().dilate(frame.astype(np.uint8), kernel) > 0 for frame in where])

    if not found.any():
        return 0.0
    precision = float(near(control)[found].mean())
    recall = float(near(found)[control].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
