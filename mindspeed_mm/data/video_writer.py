"""Converts pixels to frames, and writes video files.

Equal frames yield equal bytes. Does not import torch.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_mm.data.clips import check_av_version
from mindspeed_mm.data.images import Frames, short
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
_EXACT = {"fflags": "+bitexact"}  # no random identifiers in Matroska, so that equal frames yield equal files


def write_video(
    path: str | Path,
    frames: Frames | Iterable[Frames],
    fps: float,
    *,
    lossless: bool = False,
    quality: int = 17,
    comment: str = "",
) -> Path:
    """Write RGB frames [T, H, W, 3] (or an iterable of [H, W, 3]) at exactly `fps`.

    The file is renamed to `path` when it is complete. All formats contain H.264; with `lossless`, .mp4 and
    .mov contain lossless RGB H.264 and .mkv contains FFV1. `quality` is H.264's CRF: 0 is best, 17 is
    visually almost lossless, 51 is worst. Unless `lossless`, odd sizes are made even by repeating the last
    row or column. `comment` is stored in the file's metadata; `read_comment` reads it. Raises DataError.
    """
    import av

    path = Path(path)
    container_format = _CONTAINERS.get(path.suffix.lower())
    if container_format is None:
        raise DataError("cannot write a video of this type", where=path, fix="use .mp4, .mov or .mkv")
    check_av_version()
    try:
        with (
            atomic_path(path) as draft,
            av.open(str(draft), "w", format=container_format, options=_EXACT) as container,
        ):
            if comment:
                container.metadata["comment"] = comment
            _encode(container, iter(frames), fps, _codec(container_format, lossless), quality)
    except av.error.FFmpegError as error:
        raise DataError(f"cannot be written: {short(error)}", where=path) from None
    return path


def read_comment(path: str | Path) -> str:
    """Return the comment of a video file, or "" if it has none. Raises DataError if it is not a video."""
    import av

    try:
        with av.open(str(path)) as container:
            found = {name.lower(): text for name, text in container.metadata.items()}
            return str(found.get("comment", ""))
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"cannot be read: {short(error)}", where=path, expected="a video file") from None


def _codec(container_format: str, lossless: bool) -> tuple[str, str]:
    """Return the codec and the pixel format."""
    if not lossless:
        return "libx264", "yuv420p"
    return ("ffv1", "bgr0") if container_format == "matroska" else ("libx264rgb", "rgb24")


def _encode(
    container: Any, frames: Iterator[Frames], fps: float, codec: tuple[str, str], quality: int
) -> None:
    import av
    from av.video.reformatter import VideoReformatter

    stream: Any = None
    even = codec[1] == "yuv420p"
    converter = VideoReformatter()  # shared by all frames, because it caches its tables
    for frame in frames:
        frame = _even(frame) if even else np.ascontiguousarray(frame)
        if stream is None:
            stream = container.add_stream(codec[0], rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frame.shape[:2]
            stream.pix_fmt = codec[1]
            if codec[0] != "ffv1":
                stream.options = {"crf": str(quality if even else 0), "preset": "medium", **_repeatable()}
            if even:
                _set_colours(stream.codec_context)
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        if even:
            # Average four pixels per chroma sample. The default kernel is wider and blurs coloured edges.
            picture = converter.reformat(picture, format=codec[1], interpolation="AREA")
        container.mux(stream.encode(picture))
    if stream is None:
        raise DataError("got no frames", expected="at least one")
    container.mux(stream.encode(None))


@cache
def _repeatable() -> dict[str, str]:
    """Return x264 options for reproducible output.

    x264's AVX-512 code reads uninitialized memory, which changes its decisions; its AVX2 code does not.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        flags = ""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return {"x264-params": "asm=avx2"} if is_x86 and "avx512" in flags else {}


def _set_colours(codec: Any) -> None:
    """Store which conversion from RGB was used.

    Otherwise, players guess and assume a different one for HD, which shifts the colours.
    """
    codec.colorspace = 6  # BT.601's matrix, swscale's default; numbers of ITU-T H.273
    codec.color_range = 1  # limited
    codec.color_primaries = codec.color_trc = 1  # BT.709, as sRGB nearly is


def _even(frame: Frames) -> Frames:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def picture_frames(pixels: Tensor) -> Frames:
    """Convert pixels [3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    frames = ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).byte()
    return frames.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def clip_bytes(clip: Tensor | Frames, chosen: Sequence[int] | None = None) -> Frames:
    """Return a clip of `Conditions` or `ReadConditions`, or its `chosen` frames, as uint8 [T, H, W, 3]."""
    if isinstance(clip, np.ndarray):
        return clip if chosen is None else clip[list(chosen)]
    return picture_frames(clip if chosen is None else clip[:, list(chosen)])


def mask_bytes(mask: Tensor | Frames, chosen: Sequence[int] | None = None) -> Frames:
    """Return a mask, or its `chosen` frames, as uint8 [T, H, W]. White means generate."""
    if isinstance(mask, np.ndarray):
        return mask if chosen is None else mask[list(chosen)]
    return clip_bytes(mask.expand(3, -1, -1, -1) * 2 - 1, chosen)[..., 0]
