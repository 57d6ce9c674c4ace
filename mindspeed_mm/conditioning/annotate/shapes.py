"""Box masks, and the white canvases with boxes and contours for the layout tasks."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator

import numpy as np

from mindspeed_mm.checksum import crc32
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame, Mask, opencv
from mindspeed_mm.errors import DataError

BLACK = (0, 0, 0)
BOX_THICKNESS, CONTOUR_THICKNESS = 2, 3  # OpenCV values; the drawn lines are 3 and 5 pixels wide
Colour = tuple[int, int, int]


def clip_box(box: Box, height: int, width: int, where: str = "bbox") -> tuple[int, int, int, int]:
    """Truncate `box` to integers and clip it to the frame. Returns left, top, right, bottom.

    Raises DataError if the box has no area or is outside the frame.
    """
    left, top, right, bottom = (int(value) for value in box)
    if right <= left or bottom <= top:
        raise DataError(
            f"the box {show_box(box)} has no area",
            where=where,
            expected="left, top, right, bottom in pixels, with left < right and top < bottom",
        )
    inside = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise DataError(
            f"the box {show_box(box)} is outside the frame of {width}x{height}",
            where=where,
            fix="use left, top, right, bottom in pixels of the source",
        )
    return inside


def show_box(box: Box) -> str:
    """Format a box as `10,20,110,220`."""
    return ",".join(f"{value:g}" for value in box)


def box_mask(box: Box, height: int, width: int, where: str = "bbox") -> Mask:
    """Return a mask that is white inside `box`, clipped to the frame.

    The white rows are int(top) to int(bottom) - 1, the white columns int(left) to int(right) - 1.
    """
    left, top, right, bottom = clip_box(box, height, width, where)
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def mask_box(mask: Mask) -> tuple[int, int, int, int] | None:
    """Return the bounding box of the white pixels, or None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def moving_boxes(start: Box, end: Box, count: int) -> list[Box]:
    """Return `count` boxes whose corners move linearly from `start` to `end`."""
    steps = [i / (count - 1) if count > 1 else 0.0 for i in range(count)]
    pairs = list(zip(start, end, strict=True))
    corners = [[a + (b - a) * step for a, b in pairs] for step in steps]
    return [(left, top, right, bottom) for left, top, right, bottom in corners]


def layout_frame(box: Box, height: int, width: int, colour: Colour = BLACK) -> Frame:
    """Return a white canvas with the outline of `box`."""
    cv2 = opencv()
    canvas = np.full((height, width, 3), 255, np.uint8)
    left, top, right, bottom = (int(value) for value in box)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, BOX_THICKNESS)
    return canvas


def contour_frame(mask: Mask, colour: Colour = BLACK) -> Frame:
    """Return a white canvas with the outer contours of a mask. Holes are ignored."""
    cv2 = opencv()
    canvas = np.full((*mask.shape, 3), 255, np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, colour, CONTOUR_THICKNESS)
    return canvas


def label_colour(label: str) -> Colour:
    """Return the colour of a label. Equal labels have equal colours; an empty label is black."""
    if not label:
        return BLACK
    hue = crc32(label.encode()) / 2**32
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1.0, 0.8))
    return red, green, blue


def layout_frames(
    start: Box, end: Box, count: int, height: int, width: int, colour: Colour = BLACK
) -> Iterator[Frame]:
    """Yield `count` canvases on which a box moves from `start` to `end`."""
    for box in moving_boxes(start, end, count):
        yield layout_frame(box, height, width, colour)
