"""Chooses the frames of a clip and their size, and counts their tokens.

Pure arithmetic. Does not import torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mindspeed_mm.data.config import ClipPolicy
from mindspeed_mm.errors import DataError
from mindspeed_mm.geometry import WAN

ShortClip = Literal["keep", "pad", "resample", "reject"]
LongClip = Literal["trim", "resample", "reject"]
_SLACK = 1e-3  # seconds; Matroska rounds its timestamps to milliseconds
_SLIVER = 0.1  # fraction of a frame; a shorter remainder at the end does not count as a frame


class Timeline(Protocol):
    """The timing of a clip's frames, from its header or from an open reader."""

    @property
    def path(self) -> Path: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def times(self) -> Sequence[float]: ...  # start of each frame in seconds from the first, ascending
    @property
    def duration(self) -> float: ...  # end of the last frame in seconds
    @property
    def timed(self) -> bool: ...  # False for image folders, which have an order but no timestamps


@dataclass(frozen=True)
class FrameChoice:
    """The chosen frames of a clip, and the policy that chose them."""

    indices: tuple[int, ...]  # 4k+1 indices in ascending order; may repeat
    times: tuple[float, ...]  # the requested time of each frame in seconds from the clip's first frame
    fps: float  # frame rate of the chosen frames
    policy: str  # exact | trim | keep | pad | resample | keep_last


def choose_frames(
    times: Sequence[float],
    *,
    duration: float,
    num_frames: int,
    fps: float,
    short_clip: ShortClip = "keep",
    long_clip: LongClip = "trim",
) -> FrameChoice:
    """Choose the frames of a clip at 0, 1/fps, 2/fps, … seconds.

    `times` are the start times of the clip's frames in seconds, ascending from 0, and `duration` is its end.
    `num_frames` (4k+1) is the maximum number of frames. Raises DataError for an empty clip, and for a clip of
    another length if the policy is `reject`.
    """
    if not times:
        raise DataError("the clip has no frames", fix="replace it")
    available = max(1, math.ceil(duration * fps - _SLIVER))
    grid = [i / fps for i in range(min(available, num_frames))]
    if available == num_frames:
        return _at(times, grid, fps, "exact")
    if (available > num_frames and long_clip == "resample") or (
        available < num_frames and short_clip == "resample"
    ):
        return _spread(times, num_frames, fps)
    kept = min(num_frames, WAN.trim_frames(available))
    if (long_clip if available > num_frames else short_clip) == "reject":
        fix = "long_clip to trim" if available > num_frames else f"num_frames to {kept}, or short_clip to pad"
        raise DataError(
            f"has {available} frames at {fps:g} fps, but num_frames is {num_frames}",
            fix=f"set {fix} or resample",
        )
    if available > num_frames:
        return _at(times, grid, fps, "trim")
    if short_clip == "pad":
        return _at(times, grid + [grid[-1]] * (num_frames - available), fps, "pad")
    return _at(times, grid[:kept], fps, "keep")


def spread_to_last(times: Sequence[float], *, duration: float, num_frames: int, fps: float) -> FrameChoice:
    """Choose frames at `num_frames` even times from the first frame to the middle of the last.

    This matches Wan2.1's VACE. Each time selects the first frame on screen at that time. A clip with
    fewer frames yields the largest possible 4k+1 frames. `fps` is the frame rate for a clip without duration.
    Raises DataError for an empty clip.
    """
    if not times:
        raise DataError("the clip has no frames", fix="replace it")
    count = min(num_frames, WAN.trim_frames(len(times)))
    starts = np.array(times, dtype=np.float32)  # as decord returns them
    ends = np.array([*times[1:], duration], dtype=np.float32)
    last = float(np.stack([starts[-1], ends[-1]]).mean())
    moments = np.linspace(0.0, last, count)
    on_screen = (moments[:, None] >= starts[None]) & (moments[:, None] <= ends[None])
    rate = count / last if last > 0 else fps
    return FrameChoice(
        tuple(np.argmax(on_screen, axis=1).tolist()), tuple(moments.tolist()), rate, "keep_last"
    )


def choose(video: Timeline, policy: ClipPolicy) -> FrameChoice:
    """Choose the frames of `video` by `policy`.

    An image folder has no timestamps, so each of its images counts as one frame.
    """
    timed = video.timed and policy.timing == "seconds"
    times = video.times if timed else [i / policy.fps for i in range(video.num_frames)]
    duration = video.duration if timed else video.num_frames / policy.fps
    if policy.wan_frames:
        return spread_to_last(times, duration=duration, num_frames=policy.num_frames, fps=policy.fps)
    return choose_frames(
        times,
        duration=duration,
        num_frames=policy.num_frames,
        fps=policy.fps,
        short_clip=policy.short_clip,
        long_clip=policy.long_clip,
    )


def align(
    key: str,
    other: Timeline,
    video: Timeline,
    chosen: FrameChoice,
    *,
    against: str = "video",
    by_time: bool = True,
) -> tuple[int, ...]:
    """Return the frames of `other`, the stream `key`, that match the `chosen` frames of `video`.

    Clips with equal numbers of frames are matched frame by frame, others by time. A still mask applies to the
    whole clip. `against` names the video in messages. Raises DataError if the other stream ends
    before the last chosen frame.
    """
    is_mask = key.startswith(("src_video_mask", "src_mask"))
    if other.num_frames == 1 and is_mask:
        return (0,) * len(chosen.indices)
    if other.num_frames == video.num_frames:
        return chosen.indices
    by_time = by_time and other.timed and video.timed
    if not by_time or other.duration < chosen.times[-1] + 0.5 / chosen.fps:
        raise DataError(
            f"{key} has {other.num_frames} frames, but {against} has {video.num_frames}",
            fix=f"cut both to the same length, or {'use a still mask' if is_mask else f'set {key} to null'}",
        )
    return tuple(frame_at(other.times, moment) for moment in chosen.times)


def _at(times: Sequence[float], grid: Sequence[float], fps: float, policy: str) -> FrameChoice:
    return FrameChoice(tuple(frame_at(times, moment) for moment in grid), tuple(grid), fps, policy)


def _spread(times: Sequence[float], num_frames: int, fps: float) -> FrameChoice:
    last = times[-1]
    grid = [last * i / max(1, num_frames - 1) for i in range(num_frames)]
    rate = (num_frames - 1) / last if last > 0 and num_frames > 1 else fps
    return _at(times, grid, rate, "resample")


def frame_at(times: Sequence[float], moment: float) -> int:
    """Return the index of the frame on screen at `moment` seconds."""
    return max(0, bisect_right(times, moment + _SLACK) - 1)


def check_range(path: Path, count: int, indices: Sequence[int]) -> None:
    """Raise DataError if any index is outside a clip of `count` frames."""
    if not len(indices) or min(indices) < 0 or max(indices) >= count:
        raise DataError(f"frames {span(indices)} requested from a clip with {count}", where=path)


def span(indices: Sequence[int]) -> str:
    """Format the first and the last frame number for messages."""
    return f"{min(indices)}..{max(indices)}" if len(indices) else "(none)"


def target_size(height: int, width: int, max_hxw: int) -> tuple[int, int]:
    """Return the height and width at which a clip is used.

    Both are multiples of 16. The aspect ratio is approximately kept. The area is at most `max_hxw` pixels and
    at most that of the clip. Raises DataError for a clip smaller than one token (16 x 16).
    """
    side = WAN.token_side
    if height < side or width < side:
        raise DataError(f"got {width}x{height} pixels", expected="at least 16x16, one token")
    area = min(max_hxw / side**2, (height // side) * (width // side))
    rows = max(1, round(math.sqrt(area * height / width)))
    columns = max(1, int(area / rows))
    return side * rows, side * columns
