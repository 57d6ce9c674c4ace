"""Reads length, size and frame rate of clips from their headers. Does not import torch.

Decodes a few frames of a clip, or every image of a folder. Reads nothing else if the format allows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindspeed_mm.data.bitstream import HEAD, SizeWatch, has_several_descriptions
from mindspeed_mm.data.clips import describe_error, open_clip
from mindspeed_mm.data.image_readers import AnimationReader, ImageReader, is_animation
from mindspeed_mm.data.images import IMAGE_SUFFIXES, brightness, image_traits, read_image
from mindspeed_mm.data.packets import (
    FrameTable,
    decode_frames,
    find_size_change,
    has_index,
    list_frames,
    stream_rates,
)
from mindspeed_mm.data.pictures import clip_traits, has_alpha, mask_trait, to_rgb
from mindspeed_mm.data.video import VideoReader, clock, open_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import regular_file

_SAMPLED_KEYS = 4  # key frames that are decoded to detect damage


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """Facts about a clip. `times` assume even spacing; exact times would require reading the whole file."""

    path: Path
    num_frames: int
    height: int  # as shown: after rotation
    width: int
    fps: float
    duration: float
    timed: bool = True
    variable: bool = False  # the frame rate changes
    traits: tuple[str, ...] = ()  # see `traits.py`
    levels: tuple[int, int] | None = None  # darkest and brightest value of a mask, in the frames read

    @property
    def times(self) -> list[float]:
        """Start time of each frame in seconds, assuming even spacing."""
        return [i * self.duration / self.num_frames for i in range(self.num_frames)]


def probe_picture(path: str | Path) -> ClipInfo:
    """Probe a reference image. Raises DataError for a file that cannot be read as an image."""
    path = Path(path)
    height, width = read_image(path).shape[:2]
    return ClipInfo(
        path=path,
        num_frames=1,
        height=height,
        width=width,
        fps=0.0,
        duration=0.0,
        timed=False,
        traits=image_traits(path),
    )


def probe_mask(path: str | Path) -> ClipInfo:
    """Probe a mask and record its levels.

    Reads frames until both black and white pixels are found, usually one frame.
    """
    info = probe(path, mask=True)
    return replace(info, levels=mask_levels(open_video(path, mask=True)))


def mask_levels(reader: VideoReader) -> tuple[int, int]:
    """Return the darkest and the brightest value of a mask.

    Stops reading as soon as both black and white pixels are found.
    """
    low, high = 255, 0
    for index in range(reader.num_frames):
        values = brightness(reader.read([index]))
        low, high = min(low, int(values.min())), max(high, int(values.max()))
        if low <= 127 < high:
            break
    return low, high


def probe(path: str | Path, *, mask: bool = False) -> ClipInfo:
    """Probe a video file, an image or a folder of images.

    Raises DataError for a file that is not a video, is truncated, or is damaged at its start.
    """
    path = regular_file(path, DataError, or_folder=True)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        images = AnimationReader(path, mask=mask) if is_animation(path) else ImageReader(path, mask=mask)
        # Detect a truncated image, or one of another size, before anything is encoded.
        for index in range(1, images.num_frames):
            images.read([index])
        return ClipInfo(
            path=path,
            num_frames=images.num_frames,
            height=images.height,
            width=images.width,
            fps=images.fps,
            duration=images.duration,
            timed=images.timed,
            traits=images.traits,
        )
    try:
        return _look(path, mask=mask)
    except DataError:
        raise
    except Exception as error:  # av.error.FFmpegError, and any error that a damaged header causes
        raise describe_error(path, error) from None


def traits_of(path: Path) -> tuple[str, ...]:
    """Return the traits of a file of any kind; () if it cannot be read."""
    try:
        return probe(path, mask=True).traits
    except DataError:
        pass  # an image with another suffix, such as a reference, or an error that the reader reports
    try:
        return image_traits(path, mask=True)
    except DataError:
        return ()


def _look(path: Path, *, mask: bool) -> ClipInfo:
    container, stream = open_clip(path)
    with container:
        _check_length(path, stream)
        if _is_indexed(stream):
            return _describe(path, container, stream, None, mask=mask)
        table = list_frames(container, stream)
    # Reopen the file after reading packets: raw streams cannot seek.
    container, stream = open_clip(path)
    with container:
        return _describe(path, container, stream, table, mask=mask)


def _is_indexed(stream: Any) -> bool:
    """Return whether the header has the frame count and a constant rate, and every frame is shown.

    Matroska, WebM and MPEG-TS store no frame count. Headers of clips from phones may be wrong.
    """
    counted = bool(stream.frames and stream.duration)
    return counted and not _is_variable(stream) and _indexed_keys(stream) is not None


def _is_variable(stream: Any) -> bool:
    rates = stream_rates(stream)
    return bool(rates) and max(rates) > 1.05 * min(rates)


def _describe(path: Path, container: Any, stream: Any, table: FrameTable | None, *, mask: bool) -> ClipInfo:
    if table is None:
        count, duration = stream.frames, float(stream.duration * stream.time_base)
    else:
        count, duration = len(table.times), clock(table.times, table.last)[0]
    first = _first_frame(container, stream, table)
    if first is None:
        raise DataError("first frame cannot be decoded", where=path)
    height, width = to_rgb(first).shape[:2]
    found = mask_trait(path) if mask and has_alpha(first) else ""
    traits = clip_traits(container, stream, first, table, mask=found)
    unsure = _may_change_size(path, stream) if table is None else table.resized
    if unsure and (changed := find_size_change(path, table)):
        raise DataError(changed, where=path)
    _decode_some_keys(container, stream, table)
    rates = stream_rates(stream)
    return ClipInfo(
        path=path,
        num_frames=count,
        height=height,
        width=width,
        fps=round(rates[0] if rates and stream.average_rate else count / duration, 3),
        duration=duration,
        variable=_is_variable(stream),
        traits=traits,
    )


def _may_change_size(path: Path, stream: Any) -> bool:
    """Return whether key frames of an indexed container may differ in size. Reads the first bytes of each."""
    if has_several_descriptions(path):
        return True
    sizes = SizeWatch(stream.codec_context)
    header = 8 if stream.container.format.name == "avi" else 0
    with open(path, "rb") as file:
        for _, entry in _indexed_keys(stream) or []:
            file.seek(entry.pos + header)
            sizes.add(file.read(min(entry.size, HEAD)))
            if sizes.unsure:
                return True
    return False


def _decode_some_keys(container: Any, stream: Any, table: FrameTable | None) -> None:
    """Decode a few key frames to detect a damaged file early. FFmpeg's errors propagate."""
    if table is not None and table.by_place:
        return
    keys = [entry.timestamp for _, entry in _indexed_keys(stream) or []]
    keys = (
        keys
        if table is None
        else [stamp for place in table.keys if (stamp := table.stamps[place]) is not None]
    )
    count = min(len(keys) - 1, _SAMPLED_KEYS)
    for stamp in sorted({keys[-1 - i * (len(keys) - 1) // count] for i in range(count)}):
        container.seek(stamp, stream=stream, backward=True, any_frame=False)
        next(decode_frames(container, stream), None)


def _first_frame(container: Any, stream: Any, table: FrameTable | None) -> Any:
    """Return the frame that the readers count as frame 0, or None."""
    start = table.stamps[0] if table is not None and table.skipped else None
    return next(
        (frame for frame in decode_frames(container, stream) if start is None or frame.pts == start), None
    )


def _indexed_keys(stream: Any) -> list[tuple[int, Any]] | None:
    """Return the key frames of an indexed container as (index, entry).

    Returns None without a complete index, or if the index marks frames that a player does not show.
    """
    if not has_index(stream):
        return None
    entries = stream.index_entries
    listed = [entries[i] for i in range(stream.frames)]
    if any(entry.is_discard for entry in listed):
        return None
    return [(index, entry) for index, entry in enumerate(listed) if entry.is_keyframe]


def _check_length(path: Path, stream: Any) -> None:
    """Raise DataError if the index points past the end of the file.

    An incomplete download or copy of an MP4 has such an index.
    """
    entries = getattr(stream, "index_entries", None)
    if entries is None or not stream.frames or len(entries) == 0:
        return
    last = max((entries[i] for i in range(len(entries))), key=lambda entry: entry.pos)
    size = os.path.getsize(path)
    if last.pos + last.size > size:
        raise DataError(
            f"cut off: its index ends at byte {last.pos + last.size}, the file at {size}",
            where=path,
            fix="copy it again",
        )
