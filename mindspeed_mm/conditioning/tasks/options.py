"""Options shared by several tasks.

Lists also accept text from the command line, such as `10,20,110,220`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mindspeed_mm.conditioning.annotate.opencv import Box
from mindspeed_mm.conditioning.annotate.shapes import show_box
from mindspeed_mm.conditioning.annotate.subject import Refine
from mindspeed_mm.config.schema import Config

ANNOTATORS_FOLDER = "annotators"
SubjectMode = Literal[
    "salient",
    "mask",
    "bbox",
    "salientmasktrack",
    "salientbboxtrack",
    "masktrack",
    "bboxtrack",
    "label",
    "caption",
]
ReferenceMode = Literal["plain", SubjectMode]
MaskAugMode = Literal["original", "original_expand", "hull", "hull_expand", "bbox", "bbox_expand", "random"]


def _boxes(value: Any) -> Any:
    """Convert `"1,2,3,4"`, `["1,2,3,4", …]`, `[1, 2, 3, 4]` or `[[1, 2, 3, 4], …]` to boxes."""
    if isinstance(value, str):
        value = value.replace(";", " ").split()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected left,top,right,bottom, got {value!r:.60}")
    if len(value) == 4 and all(isinstance(item, (int, float)) for item in value):
        value = [value]
    return tuple(_box(item) for item in value)


def _box(value: Any) -> Box:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        left, top, right, bottom = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"expected left,top,right,bottom, got {value!r:.60}") from None
    if not (left < right and top < bottom):
        raise ValueError(
            f"expected left < right and top < bottom, got {show_box((left, top, right, bottom))}"
        )
    return left, top, right, bottom


def _words(value: Any) -> Any:
    """Convert `"left, right"` or a list to words."""
    if isinstance(value, str):
        return tuple(word for word in value.replace(",", " ").split())
    if isinstance(value, (list, tuple)):
        return tuple(word for item in value for word in str(item).replace(",", " ").split())
    return value


def _paths(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# The words that flags with a boolean value accept.
_TRUTHS = (
    "true",
    "t",
    "yes",
    "y",
    "on",
    "1",
    "false",
    "f",
    "no",
    "n",
    "off",
    "0",
)


def _refine(value: Any) -> Any:
    word = value.lower() if isinstance(value, str) else value
    known = word in (True, False, *_TRUTHS) or value == "fast"
    if not known:
        raise ValueError(f"expected true, false or fast, got {value!r:.60}")
    return value


Boxes = Annotated[tuple[Box, ...], BeforeValidator(_boxes)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_paths)]
Label = Annotated[str, Field(max_length=200, description="name of the subject")]
Caption = Annotated[str, Field(max_length=2000, description="description of the subject")]


class NamedSubject:
    """Mixin for options with `label` and `caption`. The modes of these names need one of the two."""

    label: str
    caption: str

    def text(self, mode: str) -> str:
        """Return the text that names the subject: `caption` first in mode `caption`, else `label` first."""
        return (self.caption or self.label) if mode == "caption" else (self.label or self.caption)


class TaskOptions(Config):
    """Options common to all tasks."""

    seed: int = Field(default=0, ge=0, description="seed of all random choices")
    annotators: str = Field(
        default=ANNOTATORS_FOLDER, description="folder of the ONNX files that depth, pose, … need"
    )
    compat: Literal["none", "official"] = Field(
        default="none", description="official: reproduce the published tool's values for gray, flow and depth"
    )

    @property
    def official(self) -> bool:
        """Whether to reproduce the values of the published tool."""
        return self.compat == "official"


class MaskOptions(TaskOptions):
    """Options for reshaping the mask of a subject."""

    maskaug_mode: MaskAugMode = Field(default="original", description="shape of the masks")
    maskaug_ratio: float = Field(
        default=0.3, ge=0, le=4, description="maximum growth of each side, as a fraction of the mask's box"
    )
    refine: Annotated[Refine, BeforeValidator(_refine)] = Field(
        default=True,
        description="refine tracked boxes and masks with GrabCut; fast: refine large ones at reduced size",
    )


class SubjectOptions(MaskOptions, NamedSubject):
    """Options for locating the subject of a clip."""

    mode: SubjectMode = Field(description="how the subject is given or found")
    bbox: Boxes = Field(default=(), description="left,top,right,bottom in pixels of the source")
    mask: str | None = Field(default=None, description="image or video, white = generate")
    label: Label = ""
    caption: Caption = ""


class ReferenceOptions(TaskOptions, NamedSubject):
    """Options for cutting out the subject of each image."""

    mode: ReferenceMode = Field(default="plain", description="how the subject is given or found")
    bbox: Boxes = Field(default=(), description="left,top,right,bottom, one for each image")
    mask: Paths = Field(default=(), description="mask image for each image, white = subject")
    label: Label = ""
    caption: Caption = ""


class ExtendOptions(TaskOptions):
    """Options for the number of added frames."""

    expand_num: int = Field(default=80, ge=1, le=100_000, description="number of frames to generate")
    num_frames: int | None = Field(
        default=None, ge=2, le=100_000, description="total number of frames; replaces expand_num"
    )


class OutpaintOptions(TaskOptions):
    """Options for the directions in which to extend a frame."""

    direction: Annotated[tuple[Literal["left", "right", "up", "down"], ...], BeforeValidator(_words)] = Field(
        default=("left", "right", "up", "down"), min_length=1, description="any of left, right, up, down"
    )
    expand_ratio: float = Field(
        default=0.25, gt=0, le=4, description="growth in each direction, as a fraction of the source's side"
    )
