"""Masks of the moving regions of a clip, from the MOG2 background model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mindspeed_mm.conditioning.annotate.opencv import Frame, Frames, Mask, opencv

_BACKGROUND_FRAMES = 48  # maximum number of frames used to learn the background, all held in memory
_ROUNDS = 3  # passes over those frames
_SHARE = 0.5  # a colour is background if a pixel has it for more than this fraction of the clip


def motion_masks(frames: Frames, *, threshold: float = 16, clean: int = 5) -> Iterator[Mask]:
    """Yield one mask per frame, white where the frame differs from the clip's background.

    Reads the clip twice: first to learn the background from sampled frames in random order, then to compare
    every frame with it, so the first frames are masked as reliably as the last. `threshold` is a squared
    Mahalanobis distance in MOG2. Specks narrower than `clean` pixels are removed.
    """
    cv2 = opencv()
    model = cv2.createBackgroundSubtractorMOG2(varThreshold=threshold, detectShadows=False)
    model.setBackgroundRatio(_SHARE)
    generator = np.random.default_rng(0)
    learned = _sample(frames, generator)
    for _ in range(_ROUNDS):
        for index in generator.permutation(len(learned)):
            model.apply(learned[index], learningRate=1 / (_ROUNDS * len(learned)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (clean, clean))
    for frame in frames():
        found = model.apply(frame, learningRate=0)
        found = cv2.morphologyEx(found, cv2.MORPH_OPEN, kernel)
        yield np.asarray(cv2.morphologyEx(found, cv2.MORPH_CLOSE, kernel))


def _sample(frames: Frames, generator: np.random.Generator) -> list[Frame]:
    """Sample frames uniformly from a clip of unknown length (reservoir sampling)."""
    kept: list[Frame] = []
    for number, frame in enumerate(frames()):
        if len(kept) < _BACKGROUND_FRAMES:
            kept.append(frame)
        elif (index := int(generator.integers(number + 1))) < _BACKGROUND_FRAMES:
            kept[index] = frame
    return kept
