"""Mask augmentation, drawn once per clip and applied to every frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mindspeed_mm.conditioning.annotate.opencv import Mask, opencv
from mindspeed_mm.conditioning.annotate.shapes import mask_box

MaskShape = Literal["original", "original_expand", "hull", "hull_expand", "bbox", "bbox_expand"]
SHAPES: tuple[MaskShape, ...] = (
    "original",
    "original_expand",
    "hull",
    "hull_expand",
    "bbox",
    "bbox_expand",
)


@dataclass(frozen=True)
class MaskAugment:
    """One draw: the shape of the mask, and how much each side grows as a fraction of the mask's box."""

    shape: MaskShape = "original"
    sides: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # left, top, right, bottom

    @classmethod
    def draw(
        cls, mode: MaskShape | Literal["random"], generator: np.random.Generator, ratio: float = 0.3
    ) -> MaskAugment:
        """Draw the augmentation of a clip.

        `random` picks one of the shapes. For `*_expand` shapes, each side grows by U(0, ratio) times the
        width or height of the mask's box.
        """
        shape = SHAPES[int(generator.integers(len(SHAPES)))] if mode == "random" else mode
        drawn = tuple(float(value) for value in generator.uniform(0, ratio, 4))
        left, top, right, bottom = drawn if shape.endswith("_expand") else (0.0, 0.0, 0.0, 0.0)
        return cls(shape, (left, top, right, bottom))

    def __call__(self, mask: Mask) -> Mask:
        """Return the mask in its new shape, with values 0 and 255. An empty mask stays empty."""
        mask = np.where(mask > 127, 255, 0).astype(np.uint8)
        if mask_box(mask) is None or self.shape == "original":
            return mask
        if self.shape.startswith("hull"):
            mask = _hull(mask)
        elif self.shape.startswith("bbox"):
            mask = _filled_box(mask)
        return _grown(mask, self.sides) if self.shape.endswith("_expand") else mask


def _hull(mask: Mask) -> Mask:
    cv2 = opencv()
    points = cv2.findNonZero(mask)
    filled = np.zeros_like(mask)
    cv2.fillConvexPoly(filled, cv2.convexHull(points), 255)
    return filled


def _filled_box(mask: Mask) -> Mask:
    box = mask_box(mask)
    filled = np.zeros_like(mask)
    if box is not None:
        filled[box[1] : box[3], box[0] : box[2]] = 255
    return filled


def _grown(mask: Mask, sides: tuple[float, float, float, float]) -> Mask:
    """Grow each side by its fraction of the box, but at most by half of the free margin on that side."""
    box = mask_box(mask)
    assert box is not None
    height, width = mask.shape
    extent = (box[2] - box[0], box[3] - box[1]) * 2
    margin = (box[0], box[1], width - box[2], height - box[3])
    left, top, right, bottom = (
        min(int(part * size), free // 2) for part, size, free in zip(sides, extent, margin, strict=True)
    )
    cv2 = opencv()
    # Dilation turns a pixel white if any pixel under the kernel is, so the kernel extends against the growth.
    kernel = np.ones((top + bottom + 1, left + right + 1), np.uint8)
    return np.asarray(
        cv2.dilate(mask, kernel, anchor=(right, bottom), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    )
