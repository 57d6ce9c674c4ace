"""Converts decoded frames to pixels (orientation, transparency) and detects clip traits.

Does not import torch.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.data.clips import is_cover, open_clip
from mindspeed_mm.data.images import BLACK, WHITE, brightness
from mindspeed_mm.data.packets import FrameTable, decode_frames, has_index, is_raw, stream_rates

_PQ, _HLG = 16, 18  # transfer functions of ITU-T H.273
_SHORT_OF = 0.9  # a clip is short below this share of the header's length; muxers round by less


def to_rgb(frame: Any, background: int = WHITE) -> NDArray[np.uint8]:
    """Convert a decoded frame to RGB [H, W, 3].

    Applies the display matrix and blends transparent pixels with `background`.
    """
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    if has_alpha(frame):
        alpha = frame.to_ndarray(format="rgba")[..., 3:]
        if alpha.min() < 255:
            weight = alpha.astype(np.float32) / 255
            image = np.asarray((image * weight + background * (1 - weight)).round().astype(np.uint8))
    return _turn(image, frame)


def to_mask(frame: Any, trait: str) -> NDArray[np.uint8]:
    """Convert a frame of a mask to RGB [H, W, 3], interpreted by the trait that `mask_trait` returns."""
    if trait == "by alpha":
        return _turn(np.repeat(frame.to_ndarray(format="rgba")[..., 3:], 3, axis=-1), frame)
    image = to_rgb(frame, BLACK)
    return (
        np.where(image.any(axis=-1, keepdims=True), 255, np.zeros_like(image)) if trait == "labels" else image
    )


def mask_trait(path: Path) -> str:
    """Return how a clip with alpha is read as a mask.

    The values are the same as for images: `by alpha`, `labels`, or '' for brightness. Every GIF has a
    palette. A GIF is read as labels if it has colours and no pixel is brighter than 127. Decodes frames until
    the answer is known, usually one frame.
    """
    black, see_through, coloured = True, False, False
    container, stream = open_clip(path)
    with container:
        is_gif = container.format.name == "gif"
        for frame in decode_frames(container, stream):
            image = frame.to_ndarray(format="rgba")
            seen = image[..., :3] * (image[..., 3:] > 0) if is_gif else image[..., :3]
            black &= not seen.any()
            see_through |= bool(image[..., 3].min() < 255)
            coloured |= bool((seen != seen[..., :1]).any())
            if not black and not (is_gif and brightness(seen).max() <= 127):
                return ""
    if is_gif:
        return "labels" if coloured else ""
    return "by alpha" if black and see_through else ""


def _turn(image: NDArray[np.uint8], frame: Any) -> NDArray[np.uint8]:
    across, down, swapped = orientation(frame)
    image = image.swapaxes(0, 1) if swapped else image
    image = image[:, ::-1] if across else image
    return np.ascontiguousarray(image[::-1] if down else image)


def has_alpha(frame: Any) -> bool:
    """Return whether the pixel format has transparency."""
    return any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Return (flip horizontally, flip vertically, swap axes). Axes are swapped before the flips."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return a < 0, d < 0, False
    return c < 0, b < 0, True


def is_mirrored(frame: Any) -> bool:
    """Return whether the display matrix contains a reflection, not only a rotation."""
    across, down, swapped = orientation(frame)
    return (across != down) != swapped


def clip_traits(
    container: Any, stream: Any, first: Any, table: FrameTable | None, *, mask: str = ""
) -> tuple[str, ...]:
    """Return the traits of a clip; see `traits.py`.

    `table` is None if the container's index is exact. `mask` is the value that `mask_trait` returns.
    """
    found = []
    others = [
        other for other in container.streams.video if other.index != stream.index and not is_cover(other)
    ]
    if stream.index != container.streams.video[0].index:
        found.append("later stream")
    elif others:
        found.append("streams")
    if table is not None:
        found += ["untimed"] if table.stamps[0] is None else ["repeats"] if _repeats(table) else []
        unclocked = is_raw(stream) or table.stamps[0] is None
        found += ["no rate"] if unclocked and not stream_rates(stream) else []
        found += ["lead"] if table.skipped else []
        found += ["short"] if _is_shorter(container, stream, table) else []
    found += ["mirrored"] if is_mirrored(first) else []
    found += ["alpha"] if has_alpha(first) else []
    found += [mask] if mask else []
    found += ["no alpha"] if _tag(stream, "alpha_mode") == "1" and not has_alpha(first) else []
    found += ["interlaced"] if first.interlaced_frame else []
    found += ["squeezed"] if stream.sample_aspect_ratio and stream.sample_aspect_ratio != 1 else []
    found += ["hdr"] if int(first.color_trc or 0) in (_PQ, _HLG) else []
    return tuple(found)


def _repeats(table: FrameTable) -> bool:
    return any(a is not None and b is not None and b <= a for a, b in pairwise(table.stamps))


def _is_shorter(container: Any, stream: Any, table: FrameTable) -> bool:
    """Return whether the frames end before the duration in the stream's header."""
    declared = _clock(_tag(stream, "duration"))
    if not declared and stream.duration:
        declared = float(stream.duration * stream.time_base)
    if (
        not declared
        and len(container.streams) == 1
        and container.duration
        and "matroska" in container.format.name
    ):
        declared = container.duration / 1_000_000
    declared -= _late_start(container, stream, table) if declared else 0
    missing = not has_index(stream) and len(table.times) < _SHORT_OF * stream.frames
    ends_early = bool(declared) and table.times[-1] + table.last < _SHORT_OF * declared - 0.1
    return table.cut or missing or ends_early


def _late_start(container: Any, stream: Any, table: FrameTable) -> float:
    """Return the seconds before the first frame that is read.

    Matroska includes them in its durations. All formats do if the clip does not begin with a key frame.
    """
    first = table.stamps[0]
    if first is not None and table.skipped and stream.start_time is not None:
        return max(0.0, float((first - stream.start_time) * stream.time_base))
    if first is None or "matroska" not in container.format.name:
        return 0.0
    return max(0.0, float(first * stream.time_base))


def _tag(stream: Any, name: str) -> str:
    """Return a tag of the stream, matched case-insensitively.

    `alpha_mode` is returned as `ALPHA_MODE` if it was written as a tag.
    """
    return next((str(value) for key, value in stream.metadata.items() if key.lower() == name), "")


def _clock(text: str) -> float:
    """Convert a time such as `00:00:02.000000000` to seconds; return 0 for any other text."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
