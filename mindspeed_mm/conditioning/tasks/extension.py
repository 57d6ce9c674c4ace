"""Extension tasks: some frames or clips are given, and the model generates the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from mindspeed_mm.conditioning.annotate.opencv import Frame, gray_frame, opencv, whole_mask
from mindspeed_mm.conditioning.tasks.options import ExtendOptions, TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Clip, Prepared, Sources, Step, task
from mindspeed_mm.errors import ConfigError, DataError

Part = Sequence[Frame] | Clip  # given frames


class FrameRefOptions(ExtendOptions):
    """Options for the positions of the given images."""

    mode: Literal["firstframe", "lastframe", "firstlastframe"] = Field(
        default="firstframe", description="position of the given frames"
    )


class ClipRefOptions(ExtendOptions):
    """Options for the positions of the given clips."""

    mode: Literal["firstclip", "lastclip", "firstlastclip"] = Field(
        default="firstclip", description="position of the given clips"
    )


class KeptFramesOptions(TaskOptions):
    """Options for which frames of a clip are kept."""

    mode: Literal["first", "last", "firstlast", "random"] = Field(
        default="first", description="which frames to keep"
    )
    ref_num: int = Field(
        default=1, ge=1, le=100_000, description="number of frames to keep; for firstlast, at each end"
    )


def _frame_ref(sources: Sources, options: FrameRefOptions) -> Prepared:
    both = options.mode == "firstlastframe"
    _check_count(len(sources.images), 2 if both else 1, "image", options.mode)
    height, width = sources.images[0].shape[:2]
    frames = [sources.images[0], *(fit_on_white(image, height, width) for image in sources.images[1:])]
    notes = [
        f"image {index}: fitted from {image.shape[1]}x{image.shape[0]} into {width}x{height}, on white"
        for index, image in enumerate(sources.images)
        if image.shape[:2] != (height, width)
    ]
    before = frames[:1] if options.mode != "lastframe" else []
    after = frames[-1:] if options.mode != "firstframe" else []
    return extended(before, after, (height, width), options, notes)


def _clip_ref(sources: Sources, options: ClipRefOptions) -> Prepared:
    both = options.mode == "firstlastclip"
    _check_count(len(sources.clips), 2 if both else 1, "clip", options.mode)
    first, last = sources.clips[0], sources.clips[-1]
    notes = []
    if last.size != first.size:
        notes.append(
            f"{last.path}: fitted from {last.size[1]}x{last.size[0]} into {first.size[1]}x{first.size[0]}, "
            "on white"
        )
    if abs(last.fps - first.fps) > 0.01:
        notes.append(f"{last.path}: has {last.fps:g} fps; the {first.fps:g} fps of the first clip is used")
    before = first if options.mode != "lastclip" else ()
    after = last if options.mode != "firstclip" else ()
    return extended(before, after, first.size, options, notes, first.fps)


def _check_count(count: int, expected: int, kind: str, mode: str) -> None:
    if count != expected:
        raise DataError(
            f"got {count} {kind}{'s' * (count != 1)}",
            where=f"mode {mode}",
            expected=f"{expected} {kind}{'s' * (expected != 1)}",
        )


def extended(
    before: Part,
    after: Part,
    size: tuple[int, int],
    options: ExtendOptions,
    notes: Sequence[str],
    fps: float = 16,
) -> Prepared:
    """Prepare the given frames with gray frames in between. The masks are black for given frames only."""
    given_frames = _length(before) + _length(after)
    total = options.num_frames if options.num_frames is not None else given_frames + options.expand_num
    if total <= given_frames:
        raise ConfigError(
            f"{given_frames} frames are given and num_frames is {total}, so nothing is left to generate",
            where="num_frames",
            fix=f"set it above {given_frames}",
        )

    def steps() -> Iterator[Step]:
        keep, make = whole_mask(*size, generate=False), whole_mask(*size, generate=True)
        for frame in _frames(before, size):
            yield frame, keep
        for _ in range(total - given_frames):
            yield gray_frame(*size), make
        for frame in _frames(after, size):
            yield frame, keep

    return Prepared(steps=steps, num_frames=total, size=size, fps=fps, notes=tuple(notes))


def _length(part: Part) -> int:
    return part.num_frames if isinstance(part, Clip) else len(part)


def _frames(part: Part, size: tuple[int, int]) -> Iterator[Frame]:
    for frame in part.frames() if isinstance(part, Clip) else part:
        yield fit_on_white(frame, *size)


def fit_on_white(image: Frame, height: int, width: int) -> Frame:
    """Scale `image` to fit into height x width, and centre it on white."""
    if image.shape[:2] == (height, width):
        return image
    cv2 = opencv()
    scale = min(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(1, round(side * scale)) for side in image.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas[top : top + rows, left : left + columns] = cv2.resize(image, (columns, rows), interpolation=method)
    return canvas


def _kept_frames(sources: Sources, options: KeptFramesOptions) -> Prepared:
    clip = sources.clip
    kept = kept_frame_indices(clip, options)

    def steps() -> Iterator[Step]:
        keep, make = whole_mask(*clip.size, generate=False), whole_mask(*clip.size, generate=True)
        for index, frame in enumerate(clip.frames()):
            yield (frame, keep) if index in kept else (gray_frame(*clip.size), make)

    notes = (f"kept frames: {', '.join(map(str, sorted(kept)))}",) if options.mode == "random" else ()
    return Prepared(steps=steps, num_frames=clip.num_frames, size=clip.size, fps=clip.fps, notes=notes)


def kept_frame_indices(clip: Clip, options: KeptFramesOptions) -> set[int]:
    """Return the indices of the frames to keep. Raises DataError for a clip that is too short."""
    total, count = clip.num_frames, options.ref_num
    needed = (2 * count if options.mode == "firstlast" else count) + 1
    if total < needed:
        raise DataError(
            f"has {total} frames; mode {options.mode} with ref_num {count} needs {needed}",
            where=clip.path,
            fix="set a smaller ref_num or use a longer clip",
        )
    if options.mode == "random":
        drawn = np.random.default_rng(options.seed).choice(total, count, replace=False)
        return {int(place) for place in drawn}
    first = set(range(count)) if options.mode in ("first", "firstlast") else set()
    return first | (set(range(total - count, total)) if options.mode in ("last", "firstlast") else set())


task(
    "frameref",
    summary="extend from images: mode firstframe, lastframe or firstlastframe",
    needs=("2 images",),
    options=FrameRefOptions,
    family="extension",
)(_frame_ref)
for _mode, _needs in (("firstframe", "image"), ("lastframe", "image"), ("firstlastframe", "2 images")):
    task(
        _mode,
        summary=(
            "extend from "
            f"{'the first and the last frame' if _needs != 'image' else f'the {_mode[:-5]} frame'}"
        ),
        needs=(_needs,),
        options=FrameRefOptions,
        family="extension",
        fixed={"mode": _mode},
    )(_frame_ref)
task(
    "clipref",
    summary="extend from clips: mode firstclip, lastclip or firstlastclip",
    needs=("2 clips",),
    options=ClipRefOptions,
    family="extension",
)(_clip_ref)
for _mode, _needs in (("firstclip", "clip"), ("lastclip", "clip"), ("firstlastclip", "2 clips")):
    task(
        _mode,
        summary=(
            f"extend from {'the first and the last clip' if _needs != 'clip' else f'the {_mode[:-4]} clip'}"
        ),
        needs=(_needs,),
        options=ClipRefOptions,
        family="extension",
        fixed={"mode": _mode},
    )(_clip_ref)
task(
    "framerefext",
    summary="keep some frames of a clip and generate the others",
    needs=("clip",),
    options=KeptFramesOptions,
    family="extension",
    supports_training=True,
)(_kept_frames)
