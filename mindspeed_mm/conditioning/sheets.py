"""Strips of a contact sheet: a clip, and what a task made of it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.conditioning.annotate.opencv import Frame
from mindspeed_mm.conditioning.tasks.spec import Clip
from mindspeed_mm.data.sheet import Strip, spread
from mindspeed_mm.data.video import VideoReader, open_video

_PICTURES = 6


def sample_strips(
    clip: Clip | None,
    src_video: Path | None,
    src_mask: Path | None,
    references: Sequence[Frame],
    name: str,
    count: int = _PICTURES,
) -> list[Strip]:
    """One strip for each stream that there is. Raises DataError."""
    strips = []
    if clip is not None:
        strips.append(_strip(f"{name}: clip", clip.reader, count))
    if src_video is not None:
        strips.append(_strip("src_video", open_video(src_video), count))
    if src_mask is not None:
        strips.append(_strip("src_mask", open_video(src_mask, mask=True), count, crisp=True))
    if references:
        strips.append(Strip(name="references", pictures=list(references[:count])))
    return strips


def _strip(name: str, reader: VideoReader, count: int, *, crisp: bool = False) -> Strip:
    places = spread(reader.num_frames, count)
    pictures = [reader.read([place])[0] for place in places]
    size = f"{reader.num_frames} frames of {reader.width}x{reader.height}"
    return Strip(
        name=name, pictures=pictures, labels=[str(place) for place in places], note=size, crisp=crisp
    )
