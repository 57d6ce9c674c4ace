"""Tasks that combine other tasks: swap, animate, expand, move, and the composition of two prepared pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.annotate.opencv import Frame, Mask, whole_mask
from mindspeed_mm.conditioning.annotate.shapes import clip_box, label_colour, layout_frames
from mindspeed_mm.conditioning.tasks.extension import extended
from mindspeed_mm.conditioning.tasks.inpaint import inpainted
from mindspeed_mm.conditioning.tasks.options import (
    Boxes,
    Caption,
    ExtendOptions,
    Label,
    MaskOptions,
    NamedSubject,
    Paths,
    ReferenceMode,
    ReferenceOptions,
    SubjectMode,
    SubjectOptions,
    TaskOptions,
)
from mindspeed_mm.conditioning.tasks.outpaint import GrowOptions, grow
from mindspeed_mm.conditioning.tasks.reference import subjects
from mindspeed_mm.conditioning.tasks.spec import (
    TASKS,
    Clip,
    Prepared,
    Sources,
    Step,
    open_task_mask,
    task,
)
from mindspeed_mm.data.images import brightness
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.errors import ConfigError, DataError

Kind = Literal["repaint", "extension", "control"]
_ALSO: Mapping[str, Kind] = {"layout": "control"}


class SwapOptions(MaskOptions, NamedSubject):
    """Options for locating the subjects of the clip and of the images."""

    mode: str = Field(
        default="salientmasktrack,salient",
        max_length=60,
        description="mode for the clip, or modes for the clip and the images: bboxtrack,salient",
    )
    bbox: Boxes = Field(default=(), description="left,top,right,bottom in the clip")
    mask: str | None = Field(default=None, description="image or video, white = generate")
    label: Label = ""
    caption: Caption = ""
    image_bbox: Boxes = Field(default=(), description="left,top,right,bottom, one for each image")
    image_mask: Paths = Field(default=(), description="mask image for each image, white = subject")


@task(
    "swap_anything",
    summary="replace the subject of a clip with the subjects of images",
    needs=("clip", "images"),
    options=SwapOptions,
    family="repaint",
    supports_training=True,
)
def swap_anything(sources: Sources, options: SwapOptions) -> Prepared:
    """Prepare the clip for inpainting, with the subjects of the images as references."""
    networks = Networks(Path(options.annotators))
    clip_mode, image_mode = split_modes(options.mode)
    values = options.model_dump(exclude={"mode", "image_bbox", "image_mask"})
    painted = inpainted(sources.clip, SubjectOptions(mode=clip_mode, **values), networks)
    text = options.text(image_mode)
    found, notes = subjects(sources, image_mode, options.image_bbox, options.image_mask, text, networks)
    return _joined(painted, found, notes, networks)


def split_modes(text: str) -> tuple[SubjectMode, ReferenceMode]:
    """Split text such as `bboxtrack,salient` into the mode of the clip and that of the images.

    A single mode applies to the clip; the images then use `salient`. Raises ConfigError.
    """
    words = [word.strip() for word in text.split(",")]
    clip_mode, image_mode = words if len(words) == 2 else (words[0], "salient")
    if len(words) > 2 or clip_mode not in get_args(SubjectMode) or image_mode not in get_args(ReferenceMode):
        raise ConfigError(
            f"got {text!r}",
            where="mode",
            expected=f"CLIP,IMAGES with the modes {', '.join(get_args(SubjectMode))} (or plain for images)",
        )
    return clip_mode, image_mode  # type: ignore[return-value]


@task(
    "animate_anything",
    summary="make the subjects of images move like the people in a clip",
    needs=("clip", "images"),
    options=ReferenceOptions,
    family="control",
    network="pose",
    supports_training=True,
)
def animate_anything(sources: Sources, options: ReferenceOptions) -> Prepared:
    """Prepare the poses of the clip, with the subjects of the images as references."""
    base = TaskOptions(seed=options.seed, annotators=options.annotators, compat=options.compat)
    posed = TASKS.get("pose").run(Sources(clips=sources.clips), base)
    networks = Networks(Path(options.annotators), dict(posed.networks))
    text = options.text(options.mode)
    found, notes = subjects(sources, options.mode, options.bbox, options.mask, text, networks)
    return _joined(posed, found, notes, networks)


def _joined(made: Prepared, references: tuple[Frame, ...], notes: list[str], networks: Networks) -> Prepared:
    return replace(made, references=references, notes=(*made.notes, *notes), networks=networks.used)


class ExpandOptions(GrowOptions, NamedSubject):
    """Options for growing the first image and extending it to a clip."""

    mode: str = Field(
        default="firstframe,plain",
        max_length=60,
        description="position of the image, and mode of further images: firstframe,salient",
    )
    bbox: Boxes = Field(default=(), description="left,top,right,bottom, one for each further image")
    mask: Paths = Field(default=(), description="mask image for each further image, white = subject")
    label: Label = ""
    caption: Caption = ""
    expand_num: int = Field(default=80, ge=1, le=100_000, description="number of frames to generate")


@task(
    "expand_anything",
    summary="extend an image in size and time; further images are references",
    needs=("images",),
    options=ExpandOptions,
    family="extension",
)
def expand_anything(sources: Sources, options: ExpandOptions) -> Prepared:
    """Place the outpainted image at the start or the end, with gray frames elsewhere."""
    where, _, image_mode = (word.strip() for word in options.mode.partition(","))
    if where in get_args(ReferenceMode) and not image_mode:
        where, image_mode = "firstframe", where
    if where not in ("firstframe", "lastframe") or (image_mode or "plain") not in get_args(ReferenceMode):
        raise ConfigError(
            f"got {options.mode!r}",
            where="mode",
            expected="firstframe or lastframe, then the mode of further images",
        )
    image = sources.images[0]
    height, width = image.shape[0], image.shape[1]
    canvas = grow(height, width, options)
    placed, border = canvas.place(image), canvas.mask(height, width)
    before, after = ([placed], []) if where == "firstframe" else ([], [placed])
    size, total = (canvas.height, canvas.width), options.expand_num + 1
    base = extended(before, after, size, ExtendOptions(expand_num=options.expand_num), ())
    at = 0 if where == "firstframe" else total - 1

    def steps() -> Iterator[Step]:
        for index, (frame, mask) in enumerate(base.read()):
            yield frame, border if index == at else mask

    networks = Networks(Path(options.annotators))
    mode: Any = image_mode or "plain"
    text = options.text(mode)
    found, notes = subjects(sources, mode, options.bbox, options.mask, text, networks, first=1)
    prepared = Prepared(steps=steps, num_frames=total, size=size)
    return _joined(prepared, found, notes, networks)


class MoveOptions(TaskOptions):
    """Options for the path along which the subject of the image moves."""

    bbox: Boxes = Field(description="two boxes left,top,right,bottom: the start and the end")
    label: str = Field(default="", max_length=200, description="name of the subject; determines the colour")
    expand_num: int = Field(default=80, ge=1, le=100_000, description="number of frames to generate")


@task(
    "move_anything",
    summary="move the subject of an image along a box",
    needs=("image",),
    options=MoveOptions,
    family="control",
)
def move_anything(sources: Sources, options: MoveOptions) -> Prepared:
    """Keep the image as the first frame, followed by canvases that show the moving box."""
    if len(options.bbox) != 2:
        raise ConfigError(
            f"got {len(options.bbox)}", where="bbox", expected="two boxes: in the first and in the last frame"
        )
    image, (start, end) = sources.images[0], options.bbox
    size = (image.shape[0], image.shape[1])
    for box in (start, end):
        clip_box(box, *size)

    def steps() -> Iterator[Step]:
        yield image, whole_mask(*size, generate=False)
        make = whole_mask(*size, generate=True)
        for frame in layout_frames(start, end, options.expand_num, *size, label_colour(options.label)):
            yield frame, make

    return Prepared(steps=steps, num_frames=options.expand_num + 1, size=size)


class ComposeOptions(TaskOptions):
    """Options for combining two prepared pairs: their files and the kind of each."""

    process_type_1: str = Field(description="kind of the first pair: a task, repaint, extension or control")
    process_type_2: str = Field(description="kind of the second pair")
    video_1: str = Field(description="src_video of the first pair")
    video_2: str = Field(description="src_video of the second pair")
    mask_1: str | None = Field(default=None, description="src_mask of the first pair; white without it")
    mask_2: str | None = Field(default=None, description="src_mask of the second pair; white without it")


@task(
    "composition",
    summary="combine two prepared pairs of src_video and src_mask",
    needs=(),
    options=ComposeOptions,
    family="repaint",
)
def composition(sources: Sources, options: ComposeOptions) -> Prepared:
    """Combine two pairs of src_video and src_mask. Raises DataError if their sizes or lengths differ."""
    kinds = kind_of(options.process_type_1), kind_of(options.process_type_2)
    first, second = _Pair(options.video_1, options.mask_1), _Pair(options.video_2, options.mask_2)
    for pair, name in ((first, "video_1"), (second, "video_2")):
        pair.check(name)
    if first.clip.size != second.clip.size or first.clip.num_frames != second.clip.num_frames:
        shapes = [f"{p.clip.num_frames} frames of {p.clip.size[1]}x{p.clip.size[0]}" for p in (first, second)]
        raise DataError(
            f"has {shapes[1]}, video_1 has {shapes[0]}",
            where=f"video_2 {second.clip.path}",
            fix="bring both pairs to one size and length",
        )

    def steps() -> Iterator[Step]:
        for (frame_1, mask_1), (frame_2, mask_2) in zip(first.read(), second.read(), strict=True):
            yield compose(frame_1, mask_1, frame_2, mask_2, kinds)

    clip, notes = first.clip, tuple(dict.fromkeys([*first.notes, *second.notes]))
    return Prepared(steps=steps, num_frames=clip.num_frames, size=clip.size, fps=clip.fps, notes=notes)


def kind_of(name: str) -> Kind:
    """Return the family of a task, or `name` itself if it is a family. Raises ConfigError."""
    if name in get_args(Kind):
        return name  # type: ignore[return-value]
    if name in _ALSO:
        return _ALSO[name]
    family = TASKS.get(name).family
    if family == "reference":
        raise ConfigError(
            f"got {name!r}, which makes references alone",
            where="process_type",
            expected="a task with src_video",
        )
    return family


def compose(
    frame_1: Frame, mask_1: Mask, frame_2: Frame, mask_2: Mask, kinds: tuple[Kind, Kind]
) -> tuple[Frame, Mask]:
    """Combine one frame from each of two pairs, (f1, m1) and (f2, m2). In the formulas, masks are 0 or 1.

    - Extension with any kind, in either order: f2 * m1 + f1 * (1 - m1), mask m1 * m2, where pair 1 is the
      extension. The frames that the extension keeps stay.
    - Repaint with control: f_control * m + f_repaint * (1 - m), mask m = m_repaint. The control fills the
      hole.
    - Two repaints or two controls: f1 * (1 - m2) + f2 * m2, mask m1 * (1 - m2) + m2.
    """
    first, second = mask_1 > 127, mask_2 > 127
    if kinds[1] == "extension" and kinds[0] != "extension":
        return compose(frame_2, mask_2, frame_1, mask_1, ("extension", kinds[0]))
    if kinds[0] == "extension":
        return _mix(frame_1, frame_2, first), _bytes(first & second)
    if kinds == ("control", "repaint"):
        return compose(frame_2, mask_2, frame_1, mask_1, ("repaint", "control"))
    if kinds == ("repaint", "control"):
        return _mix(frame_1, frame_2, first), _bytes(first)
    return _mix(frame_1, frame_2, second), _bytes(first | second)


def _mix(kept: Frame, other: Frame, where: NDArray[np.bool_]) -> Frame:
    return np.where(where[..., None], other, kept)


def _bytes(where: NDArray[np.bool_]) -> Mask:
    return np.where(where, 255, 0).astype(np.uint8)


class _Pair:
    """A src_video and its mask, read in step."""

    def __init__(self, video: str, mask: str | None) -> None:
        self.clip = Clip.open(video)
        self.notes = [f"a clip with {remark}" for remark in remarks_on(self.clip.reader.traits)]
        self._mask = None if mask is None else open_task_mask(mask, self.notes)

    def check(self, name: str) -> None:
        """Raise DataError if mask and src_video differ in size or length. A mask of one frame is allowed."""
        mask = self._mask
        if mask is None:
            return
        if (mask.height, mask.width) != self.clip.size or mask.num_frames not in (1, self.clip.num_frames):
            raise DataError(
                f"its mask has {mask.num_frames} frames of {mask.width}x{mask.height}, the clip "
                f"{self.clip.num_frames} of {self.clip.size[1]}x{self.clip.size[0]}",
                where=f"{name} {self.clip.path}",
                fix="bring both to one size and length",
            )

    def read(self) -> Iterator[tuple[Frame, Mask]]:
        white = whole_mask(*self.clip.size, generate=True)
        for index, frame in enumerate(self.clip.frames()):
            if self._mask is None:
                yield frame, white
                continue
            yield frame, brightness(self._mask.read([0 if self._mask.num_frames == 1 else index]))[0]
