"""A generated video and its inputs as pixels, the argument of every metric. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.flow import Flow, flows
from mindspeed_mm.conditioning.annotate.opencv import Frame
from mindspeed_mm.errors import DataError

Pixels = NDArray[np.uint8]  # [T, H, W, 3], RGB
PixelMask = NDArray[np.bool_]  # [T, H, W]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A video and its inputs, all of the same length and size. Raises DataError if they differ."""

    name: str
    output: Pixels
    fps: float = 16.0
    task: str = ""  # a task of `vace prepare`, or a kind inferred from the inputs
    options: Mapping[str, Any] = field(default_factory=dict)  # options of the task
    prompt: str = ""
    src_video: Pixels | None = None
    src_mask: PixelMask | None = None  # True = generate
    references: tuple[Frame, ...] = ()
    truth: Pixels | None = None  # the clip that a perfect result would equal

    def __post_init__(self) -> None:
        shape = self.output.shape[:3]
        for name, clip in (
            ("src_video", self.src_video),
            ("src_mask", self.src_mask),
            ("truth", self.truth),
        ):
            if clip is not None and clip.shape[:3] != shape:
                raise DataError(
                    f"{name} has {_size(clip.shape)}, the video {_size(shape)}",
                    where=self.name,
                    fix="score the video next to the inputs that it was generated from",
                )

    @property
    def generated(self) -> PixelMask:
        """The pixels that the model had to generate; all of them if there is no mask."""
        return np.ones(self.output.shape[:3], bool) if self.src_mask is None else self.src_mask

    @property
    def kept_frames(self) -> list[int]:
        """Indices of the frames that were given completely."""
        mask = self.src_mask
        return [] if mask is None else [number for number in range(len(mask)) if not mask[number].any()]

    @property
    def mixed_frames(self) -> list[int]:
        """Indices of the frames of which only some pixels were given."""
        mask = self.src_mask
        if mask is None:
            return []
        return [number for number in range(len(mask)) if mask[number].any() and not mask[number].all()]

    @cached_property
    def forward_flow(self) -> list[Flow]:
        """The optical flow from each frame to the next."""
        return list(flows(lambda: iter(self.output)))

    @cached_property
    def backward_flow(self) -> list[Flow]:
        """The optical flow from each frame to the previous one, starting with the second frame."""
        return list(flows(self._reversed))[::-1]

    def _reversed(self) -> Iterator[Frame]:
        return iter(self.output[::-1])


def kind_of(src_video: bool, src_mask: PixelMask | None, references: int) -> str:
    """Infer the kind of a video from its inputs. Used if its task is unknown."""
    if src_mask is not None and src_mask.any():
        whole = [bool(frame.all()) for frame in src_mask]
        empty = [not frame.any() for frame in src_mask]
        if any(empty) and all(a or b for a, b in zip(whole, empty, strict=True)):
            return "extension"
        if not all(whole):
            edges = (src_mask[:, 0], src_mask[:, -1], src_mask[:, :, 0], src_mask[:, :, -1])
            kept = np.asarray(~src_mask.any(0))
            return "outpaint" if any(edge.all() for edge in edges) and _is_box(kept) else "inpaint"
    if src_video:
        return "control"
    return "reference" if references else "text"


def _is_box(where: NDArray[np.bool_]) -> bool:
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    if not len(rows):
        return False
    return bool(where[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frames of {shape[2]}x{shape[1]}"
