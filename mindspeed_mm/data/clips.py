"""Opens video files: rejects other files, and selects the stream that a media player would show.

The check, both readers and the feature key all use this module, `packets.py` and `pictures.py`, so they
cannot disagree. Does not import torch.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mindspeed_mm.data.images import check_pixels, short
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import display_path, regular_file

MIN_AV_MAJOR = 17  # older versions decode BT.709 with the BT.601 matrix; below 15, they ignore rotation
_STILL_FORMATS = ("image2", "png", "apng", "jpeg", "bmp", "webp", "tiff", "ppm", "pgm", "gif_pipe")


def check_av_version() -> None:
    """Raise ConfigError if PyAV is missing or too old to read clips correctly. Does not import PyAV."""
    try:
        version = importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "PyAV is not installed; clips need it", fix=f"pip install 'av>={MIN_AV_MAJOR}'"
        ) from None
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < MIN_AV_MAJOR:
        raise ConfigError(
            f"PyAV {version} is installed; it reads colours and rotation incorrectly",
            expected=f"{MIN_AV_MAJOR} or newer",
            fix=f"pip install 'av>={MIN_AV_MAJOR}'",
        )


def open_clip(path: Path) -> tuple[Any, Any]:
    """Open a video file and return its container and the stream that a media player would show.

    The caller closes the container. Raises DataError for a file that is not a video. FFmpeg's errors
    propagate.
    """
    import av

    check_av_version()
    regular_file(path, DataError)
    reject_text(path)
    container: Any = av.open(str(path), metadata_errors="ignore")
    if container.format.name == "jpeg_pipe" and _is_motion_jpeg(container):
        container.close()
        container = av.open(str(path), format="mjpeg", metadata_errors="ignore")
    try:
        _reject_still(path, container)
        stream = _choose_stream(path, container)
        if stream.codec_context is None:
            raise DataError(
                "its video stream uses a codec that FFmpeg does not support",
                where=display_path(path),
                fix="check whether the file is damaged",
            )
        check_pixels(path, stream.codec_context.width or 0, stream.codec_context.height or 0)
    except BaseException:
        container.close()
        raise
    return container, stream


def reject_text(path: Path) -> None:
    """Raise DataError for a text file with a video extension.

    FFmpeg would render it as terminal output, or open it as a playlist.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    if not head:
        raise DataError("file is empty", where=path)
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head) and not head.startswith(b"YUV4MPEG"):
        raise DataError(
            f"is text, not a video: it begins with {head[:24].decode('utf-8', 'replace')!r}", where=path
        )


def _is_motion_jpeg(container: Any) -> bool:
    """Return whether the file is a sequence of JPEGs. One image followed by previews (MPO) is not."""
    packets = [packet for packet in islice(container.demux(video=0), 2) if packet.size]
    return len(packets) > 1 and b"MPF\0" not in bytes(packets[0])


def _reject_still(path: Path, container: Any) -> None:
    name = container.format.name.removesuffix("_pipe")
    if name in _STILL_FORMATS:
        kind = {"image2": "", "jpeg": "JPEG "}.get(name, f"{name.upper()} ")
        article = "an" if kind in ("", "APNG ") else "a"
        raise DataError(
            f"is {article} {kind}image with a video extension",
            where=display_path(path),
            fix="give it the extension of its format",
        )


def _choose_stream(path: Path, container: Any) -> Any:
    """Return the first default stream that is not a cover, thumbnail or still picture."""
    streams = list(container.streams.video)
    if not streams:
        raise DataError("file contains no video stream", where=display_path(path))
    moving = [stream for stream in streams if not is_cover(stream)]
    if not moving:
        raise DataError("file contains no video stream, only a cover picture", where=display_path(path))
    if len(moving) > 1:
        counts = _count_packets(path, moving)
        moving = [stream for stream in moving if counts[stream.index] > 1] or moving
    from av.stream import Disposition

    return next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])


def is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    cover = (
        Disposition.attached_pic
        | Disposition.timed_thumbnails
        | Disposition.still_image
        | Disposition.dependent
    )
    return bool(stream.disposition & cover)


def _count_packets(path: Path, streams: Sequence[Any]) -> dict[int, int]:
    """Count the packets of each stream. Without counts in the header, stop once each stream has two.

    Opens the file a second time: rewinding the first container may lose frames at the beginning.
    """
    import av

    if all(stream.frames for stream in streams):
        return {stream.index: stream.frames for stream in streams}
    counts = {stream.index: 0 for stream in streams}
    with av.open(str(path), metadata_errors="ignore") as container:
        for packet in container.demux(*(container.streams[index] for index in counts)):
            counts[packet.stream_index] += bool(packet.size)
            if min(counts.values()) > 1:
                break
    return counts


def describe_error(path: Path, error: Exception) -> DataError:
    """Convert an FFmpeg error to a DataError that names the file."""
    return DataError(f"cannot be opened as a video: {short(error)}", where=display_path(path))
