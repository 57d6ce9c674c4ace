"""Defines the structure of a task.

A task has typed options, required sources, and a function that prepares src_video, src_mask and references.

    @task(
        "canny",
        summary="Canny edges control the video",
        needs=("clip",),
        options=TaskOptions,
        family="control",
    )
    def canny(sources: Sources, options: TaskOptions) -> Prepared: ...

In every mask, white (255) means generate and black (0) means keep. Missing src_video pixels are gray (128).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mindspeed_mm.conditioning.annotate.opencv import Frame, Mask
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.images import UNTIMED_FPS, blank_mask, image_traits, read_image, reject_zero_one
from mindspeed_mm.data.probe import mask_levels
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.video import VideoReader, open_video
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import display_path
from mindspeed_mm.registry import Registry, did_you_mean

Family = Literal["control", "repaint", "extension", "reference"]
Step = tuple[Frame, Mask | None]  # a src_video frame and its mask; None for all frames of a clip = all white
_ROUNDING = 1e-3  # rounding of timestamps, in seconds
_AT_ONCE = 8  # frames per read
O = TypeVar("O", bound="Config")  # noqa: E741


@dataclass(frozen=True)
class Clip:
    """A source clip. It can be read any number of times, and holds only a few frames in memory."""

    reader: VideoReader
    count: int | None = None  # number of frames to use; None = all

    @classmethod
    def open(cls, path: str | Path) -> Clip:
        """Open a video file or a folder of images. Raises DataError."""
        return cls(open_video(path))

    @property
    def path(self) -> Path:
        return self.reader.path

    @property
    def num_frames(self) -> int:
        return self.reader.num_frames if self.count is None else min(self.count, self.reader.num_frames)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.reader.height, self.reader.width

    @property
    def fps(self) -> float:
        """The frame rate, corrected for Matroska's rounding of timestamps to milliseconds."""
        if not self.reader.timed:
            return UNTIMED_FPS
        found = self.reader.fps
        last, steps = (self.reader.times or [0.0])[-1], self.reader.num_frames - 1
        errors = {rate: abs(steps / rate - last) for rate in (round(found), round(found) / 1.001) if rate}
        nearest = min(errors, key=lambda rate: errors[rate], default=found)
        return float(nearest) if errors.get(nearest, 1.0) <= _ROUNDING else found

    def frames(self) -> Iterator[Frame]:
        """Yield all frames from the start."""
        for start in range(0, self.num_frames, _AT_ONCE):
            yield from self.reader.read(range(start, min(start + _AT_ONCE, self.num_frames)))

    def first(self, count: int) -> Clip:
        """Return a clip of the first `count` frames."""
        return replace(self, count=count)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The source clips and images of a task."""

    clips: tuple[Clip, ...] = ()
    images: tuple[Frame, ...] = ()
    names: tuple[str, ...] = ()  # names of the images, for messages
    image_remarks: tuple[str, ...] = ()  # remarks on how the image files were read

    @classmethod
    def open(cls, videos: Sequence[str | Path] = (), images: Sequence[str | Path] = ()) -> Sources:
        """Open video and image files. Raises DataError."""
        return cls(
            clips=tuple(map(Clip.open, videos)),
            images=tuple(map(read_image, images)),
            names=tuple(display_path(path) for path in images),
            image_remarks=tuple(remark for path in images for remark in remarks_on(image_traits(Path(path)))),
        )

    @property
    def clip(self) -> Clip:
        """The only clip of the task."""
        return self.clips[0]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks on how the files were read, without duplicates.

        They contain no paths, so that equal remarks of several samples can be counted.
        """
        of_clips = (remark for clip in self.clips for remark in remarks_on(clip.reader.traits))
        found = [f"a clip with {remark}" for remark in of_clips]
        return tuple(dict.fromkeys([*found, *(f"an image with {remark}" for remark in self.image_remarks)]))


def open_task_mask(path: str | Path, notes: list[str]) -> VideoReader:
    """Open a mask. Adds notes on how it was read, and on a mask with a single value.

    Raises DataError for a file that is not a mask, or that was written with the values 0 and 1.
    """
    reader = open_video(Path(path), mask=True)
    levels = mask_levels(reader)
    reject_zero_one(Path(path), levels[1])
    notes.extend(f"a mask with {remark}" for remark in remarks_on(reader.traits))
    if blank := blank_mask(levels, soft=False):
        notes.append(f"a mask that is white {blank}; white = the region, black = the rest")
    return reader


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of one generation or training sample. Frames are computed as they are read."""

    steps: Callable[[], Iterator[Step]] | None = None  # None: no src_video
    num_frames: int = 0
    size: tuple[int, int] = (0, 0)  # height, width
    fps: float = UNTIMED_FPS
    references: tuple[Frame, ...] = ()
    notes: tuple[str, ...] = ()  # remarks on what was resized, clipped or drawn
    networks: Mapping[str, str] = field(default_factory=dict)  # file → sha256

    def read(self) -> Iterator[Step]:
        """Iterate over the frames and their masks. Raises DataError if the source is damaged."""
        return iter(()) if self.steps is None else self.steps()


@dataclass(frozen=True)
class Task:
    """An entry of `TASKS`."""

    name: str
    summary: str
    needs: tuple[str, ...]  # clip, clips, image, images; a trailing "?" marks an optional source
    options: type[Config]
    run: Callable[[Sources, Any], Prepared]
    family: Family
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options that the task name fixes
    network: str = ""  # the annotator that the task requires
    supports_training: bool = False  # can make training samples from plain clips, the targets

    def parse(self, values: Mapping[str, Any], where: str) -> Any:
        """Validate plain values as the options of the task.

        Raises ConfigError for an option that the task does not have.
        """
        known = self.options.model_fields
        for key, value in values.items():
            if key not in known:
                raise ConfigError(
                    f"task {self.name} has no option {key!r}{did_you_mean(key, list(known))}",
                    where=where,
                    expected=f"one of {', '.join(known)}",
                )
            if key in self.fixed and value != self.fixed[key]:
                raise ConfigError(
                    f"got {value!r}",
                    where=f"{where}: {key}",
                    expected=f"{self.fixed[key]!r}, which the task {self.name} sets",
                )
        return parse(self.options, {**values, **self.fixed}, where)

    def prepare(self, sources: Sources, options: Any) -> Prepared:
        """Prepare the inputs.

        Raises DataError for unsuitable sources and ConfigError for unsuitable options.
        """
        self._check(sources)
        prepared = self.run(sources, options)
        return replace(prepared, notes=(*sources.remarks, *prepared.notes))

    def _check(self, sources: Sources) -> None:
        for kind, count, flag, given_as in (
            ("clip", len(sources.clips), "--video", "them"),
            ("image", len(sources.images), "--image", "them as src_ref_images of the row, or"),
        ):
            smallest, largest = count_bounds(self.needs, kind)
            if count < smallest or count > largest:
                expected = (
                    f"{smallest}"
                    if smallest == largest
                    else f"{smallest} to {largest}"
                    if largest < 99
                    else f"at least {smallest}"
                )
                fix = (
                    f"pass {given_as} with {flag}"
                    if count < smallest
                    else f"remove {flag}"
                    if not largest
                    else ""
                )
                raise DataError(
                    f"got {count} {kind}{'s' * (count != 1)}",
                    where=f"task {self.name}",
                    expected=f"{expected} {kind}{'s' * (smallest != 1 or largest not in (1, 99))}",
                    fix=fix,
                )


def count_bounds(needs: Iterable[str], kind: str) -> tuple[int, int]:
    """Return the minimum and the maximum number of sources of a kind."""
    for need in needs:
        name = need.removesuffix("?")
        low = 0 if need.endswith("?") else 1
        if name == kind:
            return low, 1
        if name == f"{kind}s":
            return low, 99
        if name == f"2 {kind}s":
            return low, 2
    return 0, 0


TASKS: Registry[Task] = Registry("task", "mindspeed_mm.tasks")


def task(
    *names: str,
    summary: str,
    needs: tuple[str, ...],
    options: type[O],
    family: Family,
    fixed: Mapping[str, Any] | None = None,
    network: str = "",
    supports_training: bool = False,
) -> Callable[[Callable[[Sources, O], Prepared]], Callable[[Sources, O], Prepared]]:
    """Register a function as a task under each of `names`."""

    def register(run: Callable[[Sources, O], Prepared]) -> Callable[[Sources, O], Prepared]:
        for name in names:
            entry = Task(
                name, summary, needs, options, run, family, dict(fixed or {}), network, supports_training
            )
            TASKS.add(name, entry)
        return run

    return register
