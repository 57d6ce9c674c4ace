"""Outpainting tasks: the canvas grows, or the border of the frame is erased."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from mindspeed_mm.conditioning.annotate.opencv import Frame, Mask, gray_frame, whole_mask
from mindspeed_mm.conditioning.tasks.options import OutpaintOptions
from mindspeed_mm.conditioning.tasks.spec import Prepared, Sources, Step, task
from mindspeed_mm.errors import ConfigError


class GrowOptions(OutpaintOptions):
    """Options for how much a frame grows, and the multiple to which its sides are rounded up."""

    multiple: int = Field(
        default=16, ge=1, le=1024, description="round the sides of the canvas up to a multiple of this"
    )


@dataclass(frozen=True)
class Canvas:
    """A larger frame with the source at (top, left)."""

    height: int
    width: int
    top: int
    left: int

    def place(self, frame: Frame) -> Frame:
        """Return the canvas with `frame` on gray."""
        canvas = gray_frame(self.height, self.width)
        canvas[self.top : self.top + frame.shape[0], self.left : self.left + frame.shape[1]] = frame
        return canvas

    def mask(self, height: int, width: int, inner: Mask | None = None) -> Mask:
        """Return a mask that is white around the source, with `inner` (or black) on the source."""
        mask = whole_mask(self.height, self.width, generate=True)
        mask[self.top : self.top + height, self.left : self.left + width] = 0 if inner is None else inner
        return mask


def grow(height: int, width: int, options: GrowOptions) -> Canvas:
    """Compute the canvas of a frame that grows by int(ratio * side) in each requested direction.

    Pixels that round a side up are added where the frame grows, otherwise on the right or at the bottom.
    """
    left, columns = _grow_side(width, "left", "right", options)
    top, rows = _grow_side(height, "up", "down", options)
    return Canvas(rows, columns, top, left)


def _grow_side(side: int, low: str, high: str, options: GrowOptions) -> tuple[int, int]:
    """Return the offset of the source and the new length of the side."""
    more = int(options.expand_ratio * side)
    before, after = more * (low in options.direction), more * (high in options.direction)
    rounded = -(side + before + after) % options.multiple
    if before and not after:
        before += rounded
    else:
        after += rounded
    return before, before + side + after


@task(
    "outpainting",
    summary="extend the frame and generate the border",
    needs=("clip",),
    options=GrowOptions,
    family="repaint",
)
def outpainting(sources: Sources, options: GrowOptions) -> Prepared:
    """Place the source on a larger gray canvas. The mask is white on the border."""
    clip = sources.clip
    canvas = grow(*clip.size, options)

    def steps() -> Iterator[Step]:
        mask = canvas.mask(*clip.size)
        for frame in clip.frames():
            yield canvas.place(frame), mask

    return Prepared(
        steps=steps,
        num_frames=clip.num_frames,
        size=(canvas.height, canvas.width),
        fps=clip.fps,
        notes=(_placed(canvas, *clip.size),),
    )


@task(
    "image_outpainting",
    summary="extend an image and generate the border",
    needs=("image",),
    options=GrowOptions,
    family="repaint",
)
def image_outpainting(sources: Sources, options: GrowOptions) -> Prepared:
    """Place one image on a larger gray canvas."""
    image = sources.images[0]
    size = (image.shape[0], image.shape[1])
    canvas = grow(*size, options)
    return Prepared(
        steps=lambda: iter([(canvas.place(image), canvas.mask(*size))]),
        num_frames=1,
        size=(canvas.height, canvas.width),
        notes=(_placed(canvas, *size),),
    )


@task(
    "outpainting_inner",
    summary="erase the border and generate it again; the size is unchanged",
    needs=("clip",),
    options=OutpaintOptions,
    family="repaint",
    supports_training=True,
)
def outpainting_inner(sources: Sources, options: OutpaintOptions) -> Prepared:
    """Replace a border of int(ratio * side) pixels with gray on each side in `direction`."""
    clip = sources.clip
    mask = inner_mask(*clip.size, options)

    def steps() -> Iterator[Step]:
        for frame in clip.frames():
            yield np.where(mask[..., None] > 0, np.uint8(128), frame), mask

    return Prepared(steps=steps, num_frames=clip.num_frames, size=clip.size, fps=clip.fps)


def inner_mask(height: int, width: int, options: OutpaintOptions) -> Mask:
    """Return a mask that is white on the border. Raises ConfigError if no pixel would be kept."""
    left, right = (
        int(options.expand_ratio * width) * (name in options.direction) for name in ("left", "right")
    )
    top, bottom = (
        int(options.expand_ratio * height) * (name in options.direction) for name in ("up", "down")
    )
    if left + right >= width or top + bottom >= height:
        raise ConfigError(
            f"erases all of {width}x{height}",
            where=f"expand_ratio {options.expand_ratio:g}",
            fix="set it below 0.5, or below 1 for one direction",
        )
    mask = whole_mask(height, width, generate=True)
    mask[top : height - bottom, left : width - right] = 0
    return mask


def _placed(canvas: Canvas, height: int, width: int) -> str:
    return f"the source is at {width}x{height}+{canvas.left}+{canvas.top} of {canvas.width}x{canvas.height}"
