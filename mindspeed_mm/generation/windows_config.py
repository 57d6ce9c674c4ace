"""Windows of videos longer than the model generates at once: keys and positions. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.data.config import ClipPolicy
from mindspeed_mm.geometry import WAN

WindowMode = Literal["extend", "context_windows"]
WindowColors = Literal["first", "none"]
LATENTS_FILE = "latents.safetensors"  # in the folder NAME, or in the folder of each window
_USUAL_OVERLAP = 13


def window_latents(folder: Path, index: int) -> Path:
    """Return the path of a window's latents. `folder` is the folder NAME."""
    return folder / f"window_{index:02d}" / LATENTS_FILE


@dataclass(frozen=True)
class Window:
    """Frames `start` to `stop` of the video. The first `lead` of them repeat the previous window."""

    index: int
    start: int
    stop: int
    lead: int

    @property
    def frames(self) -> slice:
        """The frames of the window, as a slice of the whole video."""
        return slice(self.start, self.stop)

    @property
    def latents(self) -> range:
        """The latent frames of the window, in the whole video.

        Except in the first window, the first of them also covers the three frames before `start`.
        """
        first = self.start // WAN.stride[0]
        return range(first, first + WAN.latent_frames(self.stop - self.start))


class WindowKeys(ClipPolicy):
    """The windows of a long video, and the treatment of pixels that a mask keeps."""

    window: int | None = Field(
        default=None,
        ge=5,
        le=10001,
        description=(
            "number of frames that the model generates at once, 4k+1; a longer video is generated "
            "as overlapping windows (default: all frames at once)"
        ),
    )
    window_mode: WindowMode = Field(
        default="extend",
        description=(
            "extend: each window continues the last frames of the previous one; context_windows: "
            "every denoising step computes all windows and blends them"
        ),
    )
    window_overlap: int | None = Field(
        default=None,
        gt=0,
        description=(
            "number of frames that two windows share, 4k+1 (default: 13, or a third of a short window)"
        ),
    )
    window_discard: int = Field(
        default=0,
        ge=0,
        description=(
            "number of frames to drop from the end of a window before the next one continues, a multiple of 4"
        ),
    )
    window_colors: WindowColors = Field(
        default="first",
        description=(
            "first: match the colours of each window to the first one (mean and standard "
            "deviation in Lab); none: leave colours alone"
        ),
    )
    window_references: tuple[tuple[int, ...], ...] | None = Field(
        default=None,
        description=(
            "references of each window, as lists of indices starting at 0; the last list also "
            "applies to all later windows (default: all references)"
        ),
    )
    paste_back: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description=(
            "copy the pixels that the mask keeps from the source, and adapt this many generated "
            "pixels next to them (default: use the pixels that the model generates)"
        ),
    )

    @field_validator("window", "window_overlap")
    @classmethod
    def _fits_the_vae(cls, value: int | None) -> int | None:
        if value is not None and not WAN.fits_frames(value):
            raise ValueError(f"must be 4k+1; nearest: {WAN.nearest_frames(value)}")
        return value

    @field_validator("window_discard")
    @classmethod
    def _is_whole_latents(cls, value: int) -> int:
        time = WAN.stride[0]
        if value % time:
            raise ValueError(f"must be a multiple of {time}; nearest: {round(value / time) * time}")
        return value

    @field_validator("window_references")
    @classmethod
    def _are_numbers(cls, value: tuple[tuple[int, ...], ...] | None) -> tuple[tuple[int, ...], ...] | None:
        if value is not None and not (value and all(number >= 0 for row in value for number in row)):
            raise ValueError("must be lists of numbers from 0, one list for each window")
        return value

    @model_validator(mode="after")
    def _windows_fit(self) -> WindowKeys:
        named = [
            name
            for name, field in WindowKeys.model_fields.items()
            if name.startswith("window_") and getattr(self, name) != field.default
        ]
        if self.window is None:
            if named:
                raise ValueError(f"{', '.join(named)}: window is missing; set window to 81, or remove it")
            return self
        if self.overlap + self.window_discard >= self.window:
            more = f" and window_discard {self.window_discard}" if self.window_discard else ""
            fix = f"lower window_overlap to {usual_overlap(self.window)}" + (
                more and " or window_discard to 0"
            )
            raise ValueError(
                f"window_overlap {self.overlap}{more} leave nothing of a window of {self.window} frames; "
                f"{fix}"
            )
        only_extend = [name for name in named if name in ("window_discard", "window_colors")]
        if self.window_mode == "context_windows" and only_extend:
            raise ValueError(f"{', '.join(only_extend)}: for window_mode extend; remove it")
        return self

    @property
    def overlap(self) -> int:
        """The number of frames that two windows share; 0 without windows."""
        return self.window_overlap or (usual_overlap(self.window) if self.window else 0)

    @property
    def is_windowed(self) -> bool:
        """Whether the video is longer than a window."""
        return self.window is not None and self.num_frames > self.window

    @property
    def frames_at_once(self) -> int:
        """The number of frames that the transformer processes together."""
        return self.num_frames if self.window is None else min(self.num_frames, self.window)

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows in order; a single one if the video fits into one window."""
        length, discard = self.frames_at_once, self.window_discard
        step = length - self.overlap - discard if self.is_windowed else length
        return tuple(_spans(self.num_frames, length, step, discard))

    def latent_files(self, folder: Path) -> list[Path]:
        """Return the paths of the latents of the video or of its windows. `folder` is the folder NAME."""
        if self.is_windowed and self.window_mode == "extend":
            return [window_latents(folder, window.index) for window in self.windows]
        return [folder / LATENTS_FILE]


def usual_overlap(window: int) -> int:
    """Return the default overlap: 13 frames, or less if that is more than a third of a window."""
    return min(_USUAL_OVERLAP, max(1, WAN.trim_frames(window // 3)))


def _spans(total: int, length: int, step: int, discard: int) -> Iterator[Window]:
    """Yield windows `step` frames apart. The last one ends with the video, so it may share more frames."""
    made = start = index = 0
    while True:
        start = min(start, total - length)
        yield Window(index, start, start + length, made - start if index else 0)
        if start + length == total:
            return
        made, start, index = start + length - discard, start + step, index + 1
