"""Contact-sheet strips of a clip and of what a task made from it. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.conditioning.annotate.opencv import Frame
from mindspeed_mm.conditioning.tasks.spec import Clip
from mindspeed_mm.data.sheet import Strip, spread
from mindspeed_mm.data.video import VideoReader, open_video

_MAX_IMAGES = 6


def sample_strips(
    clip: Clip | None,
    src_video: Path | None,
    src_mask: Path | None,
    references: Sequence[Frame],
    name: str,
    count: int = _MAX_IMAGES,
) -> list[Strip]:
    """Return one strip per available stream. Raises DataError."""
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
    indices = spread(reader.num_frames, count)
    pictures = [reader.read([index])[0] for index in indices]
    size = f"{reader.num_frames} frames of {reader.width}x{reader.height}"
    return Strip(
        name=name, pictures=pictures, labels=[str(index) for index in indices], note=size, crisp=crisp
    )
