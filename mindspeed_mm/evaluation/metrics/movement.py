"""Measures whether motion follows the control: colour-coded flow, or the boxes or outlines of a layout."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.flow import Flow, colour_wheel
from mindspeed_mm.conditioning.annotate.opencv import Frame, opencv
from mindspeed_mm.conditioning.annotate.shapes import mask_box
from mindspeed_mm.conditioning.annotate.subject import salient_mask
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.spec import metric

_LAYOUTS = ("layout_bbox", "layout_track")
_DRAWN = 200  # an outline is darker than this in at least one channel; the canvas is white


@metric("flow_error", unit="px", better="lower", summary="optical flow against the control's; task flow")
def flow_error(sample: Sample) -> float | None:
    """Return the mean end-point error.

    Colours do not encode the length of the longest vector, so the best-fitting length is used.
    """
    control = sample.src_video
    if control is None or sample.task != "flow" or len(control) < 2:
        return None
    expected = np.stack([decode_flow(frame) for frame in control[1:]])
    found = np.stack(sample.forward_flow)
    size = float(np.square(expected).sum())
    radius = max(float((expected * found).sum()) / size, 0.0) if size else 0.0
    return float(np.linalg.norm(found - radius * expected, axis=-1).mean())


@metric(
    "layout_iou",
    better="higher",
    summary="box of the salient subject against the control's box; tasks layout_bbox, layout_track",
)
def layout_iou(sample: Sample) -> float | None:
    """Return the mean IoU over frames with a box. A frame without a subject counts as 0."""
    control = sample.src_video
    if control is None or sample.task not in _LAYOUTS:
        return None
    found = []
    for frame, made in zip(control, sample.output, strict=True):
        expected = mask_box(np.where(frame.min(-1) < _DRAWN, 255, 0).astype(np.uint8))
        if expected is not None:
            box = mask_box(salient_mask(made))
            found.append(0.0 if box is None else box_iou(box, expected))
    return float(np.mean(found)) if found else None


def box_iou(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """Return the intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return both / (areas - both)


def decode_flow(frame: Frame) -> Flow:
    """Decode colours of `colour_flow` [H, W, 3] to vectors [H, W, 2], in units of its radius."""
    lack = 1 - frame.astype(np.float32) / 255  # a pure hue has a channel of 0, so the maximum is the length
    length = lack.max(-1)
    hue = 1 - lack / np.maximum(length, 1e-6)[..., None]
    degrees = opencv().cvtColor(hue.astype(np.float32), opencv().COLOR_RGB2HSV)[..., 0]
    hues, places = _wheel()
    angle = np.interp(degrees, hues, places)
    return np.stack([length * np.cos(angle), length * np.sin(angle)], -1).astype(np.float32)


@functools.cache
def _wheel() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return hues in OpenCV's degrees and their directions in `colour_flow`, which go from 0 to 2 pi."""
    colours = (colour_wheel() / 255).astype(np.float32)[None]
    hues = opencv().cvtColor(colours, opencv().COLOR_RGB2HSV)[0, :, 0].astype(np.float64)
    return hues, np.arange(len(hues)) * 2 * np.pi / (len(hues) - 1)
