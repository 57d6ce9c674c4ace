"""Layout tasks: a box or an outline on white shows where the subject is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.annotate.shapes import clip_box, contour_frame, label_colour, layout_frames
from mindspeed_mm.conditioning.tasks.control import controlled
from mindspeed_mm.conditioning.tasks.options import Boxes, SubjectOptions, TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Prepared, Sources, task
from mindspeed_mm.conditioning.tasks.subjects import check_mode, subject_masks
from mindspeed_mm.errors import ConfigError


class LayoutOptions(TaskOptions):
    """Options for the start and end boxes and the size of the canvas."""

    bbox: Boxes = Field(description="two boxes left,top,right,bottom: in the first and in the last frame")
    label: str = Field(default="", max_length=200, description="name of the subject; determines the colour")
    num_frames: int = Field(default=81, ge=1, le=100_000, description="number of frames")
    height: int = Field(default=480, ge=16, le=8192, description="height of the canvas")
    width: int = Field(default=832, ge=16, le=8192, description="width of the canvas")


@task(
    "layout_bbox",
    summary="an outlined box on white that moves from one position to another",
    needs=(),
    options=LayoutOptions,
    family="control",
)
def layout_bbox(sources: Sources, options: LayoutOptions) -> Prepared:
    """Prepare a moving box on white. Needs no source."""
    if len(options.bbox) != 2:
        raise ConfigError(
            f"got {len(options.bbox)}",
            where="bbox",
            expected="two boxes: in the first and in the last frame",
            fix="pass --bbox LEFT,TOP,RIGHT,BOTTOM LEFT,TOP,RIGHT,BOTTOM",
        )
    size, (start, end) = (options.height, options.width), options.bbox
    for box in (start, end):
        clip_box(box, *size)
    colour = label_colour(options.label)
    return Prepared(
        steps=lambda: (
            (frame, None) for frame in layout_frames(start, end, options.num_frames, *size, colour)
        ),
        num_frames=options.num_frames,
        size=size,
    )


@task(
    "layout_track",
    summary="the outline of the tracked subject, on white",
    needs=("clip",),
    options=SubjectOptions,
    family="control",
    supports_training=True,
)
def layout_track(sources: Sources, options: SubjectOptions) -> Prepared:
    """Prepare the outline of the tracked subject on white."""
    networks = Networks(Path(options.annotators))
    check_mode(options.mode, options.text(options.mode), networks)
    notes: list[str] = []
    masked = subject_masks(sources.clip, options, networks, notes)
    colour = label_colour(options.label)
    found = controlled(sources.clip, lambda: (contour_frame(mask, colour) for _, mask in masked()), networks)
    return replace(found, notes=tuple(notes))
