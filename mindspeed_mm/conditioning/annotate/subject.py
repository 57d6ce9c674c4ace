"""Locates the subject of a clip with saliency, GrabCut and box tracking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.backdrop import backdrop_contrast
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame, Mask, opencv
from mindspeed_mm.conditioning.annotate.shapes import box_mask, clip_box, mask_box, show_box
from mindspeed_mm.errors import DataError

Pixels = tuple[int, int, int, int]  # left, top, right, bottom
Refine = bool | Literal["fast"]  # fast: run GrabCut at reduced size for a large subject
_MARGIN = 0.15  # width of the background margin that GrabCut learns from, as a fraction of the box
_SWING = 0.1  # how far a moving subject may leave a tracked box, as a fraction of the box's mean side
_THIN = 16  # maximum aspect ratio of a box that CSRT can track
_MIN_SHARE = 0.05  # a cut smaller than this fraction of the box has failed
_FAST = 256 * 256  # number of pixels in a fast cut
_LARGE = 0.3  # a salient region smaller than this fraction of the largest one is a speck
_SALIENT_SIDE = 256  # longer side at which saliency is computed; the spectrum needs no fine detail


def saliency(frame: Frame) -> NDArray[np.float32]:
    """Compute the smoothed spectral-residual saliency [H, W] in [0, 1] (Hou and Zhang, 2007)."""
    cv2 = opencv()
    height, width = frame.shape[:2]
    scale = _SALIENT_SIDE / max(height, width)
    small = cv2.resize(frame, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=3)
    _, found = cv2.saliency.StaticSaliencySpectralResidual_create().computeSaliency(
        cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    )
    found = cv2.GaussianBlur(found.astype(np.float32), (0, 0), 6)
    found = cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR)
    low, high = float(found.min()), float(found.max())
    return np.asarray((found - low) / max(high - low, 1e-6), np.float32)


def salient_mask(frame: Frame) -> Mask:
    """Return the mask of the most salient subject, which may be empty.

    Applies Otsu's threshold, takes the box around the large regions, and refines it with GrabCut. On a plain
    backdrop, saliency is the difference from the backdrop. Otherwise it is spectral saliency, which responds
    to outlines and may split a subject into several regions, so the box covers all large ones.
    """
    cv2 = opencv()
    differs = backdrop_contrast(frame)
    found = ((saliency(frame) if differs is None else differs) * 255).astype(np.uint8)
    _, binary = cv2.threshold(found, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    count, labels, facts, _ = cv2.connectedComponentsWithStats(binary)
    if count < 2:
        return np.zeros(frame.shape[:2], np.uint8)
    areas = facts[:, cv2.CC_STAT_AREA]
    large = [index for index in range(1, count) if areas[index] >= _LARGE * areas[1:].max()]
    box = mask_box(np.where(np.isin(labels, large), 255, 0).astype(np.uint8))
    return np.zeros(frame.shape[:2], np.uint8) if box is None else grabcut(frame, box)


def grabcut(
    frame: Frame,
    box: Box,
    seed: Mask | None = None,
    iterations: int = 4,
    *,
    swing: int = 0,
    fast: bool = False,
) -> Mask:
    """Return the mask of the subject inside `box` (GrabCut, Rother et al., 2004).

    Returns the whole box if the cut fails. `seed` marks pixels that probably belong to the subject; by
    default, all pixels in the box do. Only the box and a margin around it are processed. The subject may
    extend `swing` pixels beyond the box. With `fast`, an area larger than 256x256 pixels is cut at that size,
    and only the border of the subject at full size.
    """
    cv2 = opencv()
    height, width = frame.shape[:2]
    whole = box_mask(box, height, width)
    left, top, right, bottom = clip_box(box, height, width)
    left, top = max(0, left - swing), max(0, top - swing)
    right, bottom = min(width, right + swing), min(height, bottom + swing)
    across, down = (round(_MARGIN * size) + 2 for size in (right - left, bottom - top))
    view = (max(0, left - across), max(0, top - down), min(width, right + across), min(height, bottom + down))
    area = np.ascontiguousarray(frame[view[1] : view[3], view[0] : view[2]])
    state = np.full(area.shape[:2], cv2.GC_BGD, np.uint8)
    inner = state[top - view[1] : bottom - view[1], left - view[0] : right - view[0]]
    inner[...] = cv2.GC_PR_FGD
    if seed is not None:
        inside = seed[top:bottom, left:right] > 127
        inner[...] = np.where(inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    if not (state == cv2.GC_BGD).any() or not (state == cv2.GC_PR_FGD).any():
        return whole  # nothing to separate: the box fills the frame, or the seed is outside the box
    try:
        if fast and state.size > _FAST:
            state = _cut_small(area, state, iterations)
            iterations = 1
        cut = _cut(area, state, iterations)
    except cv2.error:
        return whole
    cut = cv2.morphologyEx(cut, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    if (cut > 0).sum() < _MIN_SHARE * (right - left) * (bottom - top):
        return whole
    mask = np.zeros((height, width), np.uint8)
    mask[view[1] : view[3], view[0] : view[2]] = cut
    return mask


def _cut(area: Frame, state: NDArray[np.uint8], iterations: int) -> Mask:
    """Run GrabCut. Raises cv2.error if the subject or the background has no pixels."""
    cv2 = opencv()
    cv2.setRNGSeed(0)  # GrabCut initializes its clusters at random
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(area, state, None, *models, iterations, cv2.GC_INIT_WITH_MASK)
    return np.where((state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD), 255, 0).astype(np.uint8)


def _cut_small(area: Frame, state: NDArray[np.uint8], iterations: int) -> NDArray[np.uint8]:
    """Cut at about `_FAST` pixels, and return the full-size state with only the border undecided."""
    cv2 = opencv()
    scale = math.sqrt(_FAST / state.size)
    size = tuple(max(1, round(side * scale)) for side in (state.shape[1], state.shape[0]))
    small = cv2.resize(area, size, interpolation=cv2.INTER_AREA)
    found = _cut(small, cv2.resize(state, size, interpolation=cv2.INTER_NEAREST), iterations)
    found = cv2.resize(found, state.shape[::-1], interpolation=cv2.INTER_LINEAR)
    inside = np.where(found > 127, 255, 0).astype(np.uint8)
    reach = np.ones((2 * math.ceil(1.5 / scale) + 1,) * 2, np.uint8)
    likely = np.where(inside > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    settled = np.where(cv2.dilate(inside, reach) > 0, likely, cv2.GC_BGD)
    settled = np.where(cv2.erode(inside, reach) > 0, cv2.GC_FGD, settled)
    return np.asarray(np.where(state == cv2.GC_BGD, cv2.GC_BGD, settled), np.uint8)


def track_box(frames: Iterable[Frame], box: Box) -> Iterator[tuple[Frame, Pixels]]:
    """Yield each frame with its box: `box` in the first frame, then the box found by the CSRT tracker.

    Boxes are clipped to the frame. If the tracker loses the subject, the last box is repeated. Raises
    DataError for a box that the tracker cannot follow.
    """
    cv2 = opencv()
    tracker = None
    inside: tuple[float, ...] = (0, 0, 1, 1)  # the box as fractions of the tracked area
    last: Pixels = (0, 0, 0, 0)
    for frame in frames:
        height, width = frame.shape[:2]
        if tracker is None:
            last = clip_box(box, height, width)
            left, top, right, bottom = _thick(last, height, width)
            across, down = right - left, bottom - top
            inside = (
                (last[0] - left) / across,
                (last[1] - top) / down,
                (last[2] - left) / across,
                (last[3] - top) / down,
            )
            tracker = cv2.TrackerCSRT_create()
            try:
                tracker.init(frame, (left, top, across, down))
            except cv2.error:
                raise DataError(
                    "cannot be followed through the clip",
                    where=f"box {show_box(last)}",
                    fix="use another box, or a mode without track",
                ) from None
        else:
            found, (left, top, across, down) = tracker.update(frame)
            moved = (
                max(0, round(left + inside[0] * across)),
                max(0, round(top + inside[1] * down)),
                min(width, round(left + inside[2] * across)),
                min(height, round(top + inside[3] * down)),
            )
            last = moved if found and moved[0] < moved[2] and moved[1] < moved[3] else last
        yield frame, last


def _thick(box: Pixels, height: int, width: int) -> Pixels:
    """Return `box`, extended if it is too thin for CSRT to track."""
    left, top, right, bottom = box
    min_side = max(4, -(-max(right - left, bottom - top) // _THIN))
    across, down = max(0, min_side - (right - left)), max(0, min_side - (bottom - top))
    left, top = max(0, left - across // 2), max(0, top - down // 2)
    return left, top, min(width, right + across - across // 2), min(height, bottom + down - down // 2)


def _swing(box: Pixels) -> int:
    left, top, right, bottom = box
    return max(2, round(_SWING * math.sqrt((right - left) * (bottom - top))))


def track_box_masks(
    frames: Iterable[Frame], box: Box, *, refine: Refine = True
) -> Iterator[tuple[Frame, Mask]]:
    """Yield each frame with the tracked box as a mask, refined by GrabCut if `refine` is set."""
    for frame, found in track_box(frames, box):
        if refine:
            yield frame, grabcut(frame, found, swing=_swing(found), fast=refine == "fast")
        else:
            yield frame, box_mask(found, *frame.shape[:2])


def track_mask(frames: Iterable[Frame], mask: Mask, *, refine: Refine = True) -> Iterator[tuple[Frame, Mask]]:
    """Yield each frame with `mask` moved and scaled to follow the tracked box.

    The first mask is `mask` itself. `refine` fits the later ones to their frames with GrabCut. An empty mask
    stays empty.
    """
    cv2 = opencv()
    start = mask_box(mask)
    if start is None:
        yield from ((frame, np.zeros(frame.shape[:2], np.uint8)) for frame in frames)
        return
    shape = mask[start[1] : start[3], start[0] : start[2]]
    for index, (frame, box) in enumerate(track_box(frames, start)):
        left, top, right, bottom = box
        moved = np.zeros(frame.shape[:2], np.uint8)
        moved[top:bottom, left:right] = cv2.resize(
            shape, (right - left, bottom - top), interpolation=cv2.INTER_NEAREST
        )
        if not refine or not index:
            yield frame, moved
            continue
        swing = _swing(box)
        near = cv2.dilate(moved, np.ones((4 * swing + 1, 4 * swing + 1), np.uint8))
        yield frame, grabcut(frame, box, near, swing=swing, fast=refine == "fast")
