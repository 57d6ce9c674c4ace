"""Control tasks: a clip of depth, flow, lines, … guides every frame. Masks are not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mindspeed_mm.conditioning.annotate import lines
from mindspeed_mm.conditioning.annotate.flow import flow_frames
from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.annotate.opencv import Frame, as_rgb
from mindspeed_mm.conditioning.annotate.spool import Spool
from mindspeed_mm.conditioning.tasks.options import TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Clip, Prepared, Sources, task
from mindspeed_mm.errors import DataError

Annotate = Callable[[Frame], Frame]


class CannyOptions(TaskOptions):
    """Thresholds of the Canny edge detector."""

    low: float = Field(default=100, ge=0, le=10_000, description="Canny: gradient that continues an edge")
    high: float = Field(default=200, ge=0, le=10_000, description="Canny: gradient that starts an edge")


def controlled(
    clip: Clip, frames: Callable[[], Iterator[Frame]], networks: Networks | None = None
) -> Prepared:
    """Prepare `frames` with the length, size and rate of the clip, without masks."""
    return Prepared(
        steps=lambda: ((frame, None) for frame in frames()),
        num_frames=clip.num_frames,
        size=clip.size,
        fps=clip.fps,
        networks={} if networks is None else networks.used,
    )


def still(image: Frame, networks: Networks | None = None) -> Prepared:
    """Prepare one frame without a mask."""
    return Prepared(
        steps=lambda: iter([(image, None)]),
        num_frames=1,
        size=image.shape[:2],
        networks={} if networks is None else networks.used,
    )


def _each(name: str, summary: str, annotate: Callable[[TaskOptions], Annotate]) -> None:
    """Register a per-frame task as NAME for clips and as image_NAME for images."""

    @task(
        name,
        summary=summary,
        needs=("clip",),
        options=TaskOptions,
        family="control",
        supports_training=name != "plain",
    )
    def run(sources: Sources, options: TaskOptions) -> Prepared:
        made = annotate(options)
        return controlled(sources.clip, lambda: map(made, sources.clip.frames()))

    @task(
        f"image_{name}",
        summary=f"{summary}, of an image",
        needs=("image",),
        options=TaskOptions,
        family="control",
    )
    def run_image(sources: Sources, options: TaskOptions) -> Prepared:
        return still(annotate(options)(sources.images[0]))


_each("plain", "the unchanged source", lambda options: lambda frame: frame)
_each("gray", "luma", lambda options: partial(lines.gray, official=options.official))
_each("scribble", "black strokes on white", lambda options: lines.scribble)
_each("xdog", "soft black strokes on white", lambda options: lines.xdog)
_each("edge", "white edges on black (EdgeDrawing)", lambda options: lines.edge)


@task(
    "canny",
    summary="white edges on black (Canny)",
    needs=("clip",),
    options=CannyOptions,
    family="control",
    supports_training=True,
)
def canny(sources: Sources, options: CannyOptions) -> Prepared:
    """Prepare Canny edges."""
    convert = partial(lines.canny, low=options.low, high=options.high)
    return controlled(sources.clip, lambda: map(convert, sources.clip.frames()))


@task(
    "flow",
    summary="optical flow in colours",
    needs=("clip",),
    options=TaskOptions,
    family="control",
    supports_training=True,
)
def flow(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare DIS flow with one scale for the whole clip. Raises DataError for a clip of one frame."""
    clip = sources.clip
    if clip.num_frames < 2:
        raise DataError("has 1 frame; flow needs at least 2", where=clip.path, fix="use a longer clip")
    return controlled(clip, lambda: flow_frames(clip.frames, official=options.official))


@task(
    "depth",
    "depthv2",
    summary="depth, near = bright",
    needs=("clip",),
    options=TaskOptions,
    family="control",
    network="depth",
    supports_training=True,
)
def depth(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare depth with one scale for the whole clip."""
    networks = Networks(Path(options.annotators))
    estimate = networks.open("depth")
    clip = sources.clip
    return controlled(clip, lambda: depth_frames(clip.frames, estimate, official=options.official), networks)


def depth_frames(
    frames: Callable[[], Iterator[Frame]],
    estimate: Callable[[Frame], NDArray[np.float32]],
    *,
    official: bool = False,
) -> Iterator[Frame]:
    """Estimate disparities d and yield them as gray frames.

    A pixel is floor(255 * (d - low) / (high - low)). `low` and `high` are the extremes of the clip, or with
    `official` those of each frame.
    """
    with Spool() as spool:
        low, high = np.inf, -np.inf
        for frame in frames():
            values = estimate(frame)
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            spool.add(values)
        for values in spool:
            bounds = (float(values.min()), float(values.max())) if official else (low, high)
            scaled = (values - bounds[0]) / max(bounds[1] - bounds[0], 1e-6)
            yield as_rgb((scaled * 255).clip(0, 255).astype(np.uint8))


@task(
    "image_depth",
    summary="depth of an image, near = bright",
    needs=("image",),
    options=TaskOptions,
    family="control",
    network="depth",
)
def image_depth(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare the depth of one image."""
    networks, image = Networks(Path(options.annotators)), sources.images[0]
    return still(next(depth_frames(lambda: iter([image]), networks.open("depth"))), networks)


def _pose(sources: Sources, options: TaskOptions, part: str) -> Prepared:
    networks = Networks(Path(options.annotators))
    draw = networks.open("pose")
    clip = sources.clip
    return controlled(clip, lambda: (draw(frame, part) for frame in clip.frames()), networks)


@task(
    "pose",
    summary="skeletons of people, body and face, on black",
    needs=("clip",),
    options=TaskOptions,
    family="control",
    network="pose",
    supports_training=True,
)
def pose(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare the poses of the body and face."""
    return _pose(sources, options, "body_face")


@task(
    "pose_body",
    summary="skeletons of people, body only, on black",
    needs=("clip",),
    options=TaskOptions,
    family="control",
    network="pose",
    supports_training=True,
)
def pose_body(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare the poses of the body only."""
    return _pose(sources, options, "body")


@task(
    "image_pose",
    summary="skeletons of the people of an image",
    needs=("image",),
    options=TaskOptions,
    family="control",
    network="pose",
)
def image_pose(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare the pose of the body and face in one image."""
    networks = Networks(Path(options.annotators))
    return still(networks.open("pose")(sources.images[0], "body_face"), networks)
