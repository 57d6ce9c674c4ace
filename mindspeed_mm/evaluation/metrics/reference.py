"""Measures whether the references appear in the video, by colours and outlines in each frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import Frame, opencv
from mindspeed_mm.conditioning.annotate.shapes import mask_box
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.spec import metric

_BINS = 8  # histogram bins per channel
_LEAST = 0.01  # minimum fraction of the reference's pixels for a colour to be part of its palette
_AREA = 0.02  # a palette that covers less than this fraction of a frame lowers the score
_WHITE = 245  # minimum level of a pixel in the white border
_SIDE = 64  # side of the images whose outlines are compared


@metric("reference_colour", better="higher", summary="fraction of the reference's colours in the frames")
def reference_colour(sample: Sample) -> float | None:
    """Return the mean over references and frames of the intersection of their palette histograms."""
    values = [
        _colour_share(_histogram(picture[subject(picture)]), frame)
        for picture in sample.references
        for frame in sample.output
    ]
    return float(np.mean(values)) if values else None


@metric(
    "reference_shape",
    better="higher",
    summary="outlines of the reference against those of its colours in the frames",
)
def reference_shape(sample: Sample) -> float | None:
    """Return the cosine similarity of the histograms of oriented gradients.

    It is a mean over references and frames. A frame with none of the reference's colours counts as 0.
    """
    found = []
    for picture in sample.references:
        where = subject(picture)
        palette = _palette(picture[where])
        expected = _outline(where)
        for frame in sample.output:
            there = _largest(palette[_bins(frame)])
            found.append(float(expected @ _outline(there)) if there.any() else 0.0)
    return float(np.mean(found)) if found else None


def subject(picture: Frame) -> NDArray[np.bool_]:
    """Return the pixels that are not in the white border; all pixels if there is no border."""
    where = np.asarray((picture < _WHITE).any(-1))
    return where if where.any() else np.ones_like(where)


def _bins(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the histogram bin of each pixel."""
    parts = pixels.astype(np.int64) * _BINS // 256
    return np.asarray((parts[..., 0] * _BINS + parts[..., 1]) * _BINS + parts[..., 2])


def _histogram(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    counts = np.bincount(_bins(pixels).ravel(), minlength=_BINS**3)
    return np.asarray(counts / max(counts.sum(), 1))


def _palette(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return _histogram(pixels) >= _LEAST


def _colour_share(expected: NDArray[np.float64], frame: Frame) -> float:
    counts = np.bincount(_bins(frame).ravel(), minlength=_BINS**3) * (expected >= _LEAST)
    enough = max(counts.sum(), _AREA * frame.shape[0] * frame.shape[1])
    return float(np.minimum(expected, counts / enough).sum())


def _largest(where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest connected component."""
    count, labels, facts, _ = opencv().connectedComponentsWithStats(where.astype(np.uint8), connectivity=8)
    if count < 2:
        return where
    return np.asarray(labels == 1 + int(np.argmax(facts[1:, opencv().CC_STAT_AREA])))


def _outline(where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scale a silhouette to a square, and return its histogram of oriented gradients as a unit vector."""
    cv2 = opencv()
    box = mask_box(np.where(where, 255, 0).astype(np.uint8))
    assert box is not None
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    canvas = np.zeros((side, side), np.uint8)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    canvas[y : y + bottom - top, x : x + right - left] = np.where(where[top:bottom, left:right], 255, 0)
    inner = cv2.resize(canvas, (_SIDE - 16, _SIDE - 16), interpolation=cv2.INTER_AREA)
    framed = cv2.copyMakeBorder(inner, 8, 8, 8, 8, cv2.BORDER_CONSTANT)
    hog = cv2.HOGDescriptor((_SIDE, _SIDE), (16, 16), (8, 8), (8, 8), 9)
    values = np.asarray(hog.compute(framed), np.float64).ravel()
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-9))
