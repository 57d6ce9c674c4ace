"""What a clip's header says: length, size, rate. One frame is decoded; nothing else is read where the format allows. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.data.video import IMAGE_SUFFIXES, ImageReader, clock, index_frames, refuse_text, short, upright
from mindspeed_mm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """A clip, unopened. `times` are even: exact ones need the whole file."""

    path: Path
    num_frames: int
    height: int  # as shown: after rotation
    width: int
    fps: float
    duration: float
    timed: bool = True
    variable: bool = False  # the frame rate changes
    squeezed: bool = False  # its pixels are not square

    @property
    def times(self) -> list[float]:
        """When each frame comes on, were they even."""
        return [i * self.duration / self.num_frames for i in range(self.num_frames)]


def probe(path: str | Path) -> ClipInfo:
    """Look at a video file, an image or a folder of images. Raises DataError for what is no video, cut off, or damaged at its start."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        images = ImageReader(path)
        return ClipInfo(
            path=path,
            num_frames=images.num_frames,
            height=images.height,
            width=images.width,
            fps=images.fps,
            duration=images.duration,
            timed=False,
        )
    if not path.exists():
        raise DataError(f"{path}: no such file")
    refuse_text(path)
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            return _look(path, container)
    except DataError:
        raise
    except Exception as error:  # av.error.FFmpegError, and whatever a damaged header leads to
        raise DataError(f"{path}: cannot be opened as a video: {short(error)}") from None


def _look(path: Path, container: Any) -> ClipInfo:
    if not container.streams.video:
        raise DataError(f"{path}: there is no video in it")
    stream = container.streams.video[0]
    _check_length(path, stream)
    base = float(stream.time_base)
    count, duration = stream.frames, (stream.duration or 0) * base
    rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    variable = bool(rates) and max(rates) > 1.05 * min(rates)
    if (
        not count or not duration or variable
    ):  # Matroska, WebM, MPEG-TS keep no count; of phones' clips the header may be wrong
        stamps, _, last = index_frames(container, stream)
        count = len(stamps)
        duration = clock([(stamp - stamps[0]) * base for stamp in stamps], last * base)[0]
        container.seek(0)
    first = next(container.decode(stream), None)
    if first is None:
        raise DataError(f"{path}: the first frame cannot be decoded")
    height, width = upright(first).shape[:2]
    aspect = stream.sample_aspect_ratio
    return ClipInfo(
        path=path,
        num_frames=count,
        height=height,
        width=width,
        fps=round(float(stream.average_rate or count / duration), 3),
        duration=duration,
        variable=variable,
        squeezed=bool(aspect) and aspect != 1,
    )


def _check_length(path: Path, stream: Any) -> None:
    """MP4's index says where each frame lies: behind the end of the file when a download or a copy broke off."""
    entries = getattr(stream, "index_entries", None)
    if entries is None or not stream.frames or len(entries) == 0:
        return
    last = max((entries[i] for i in range(len(entries))), key=lambda entry: entry.pos)
    size = os.path.getsize(path)
    if last.pos + last.size > size:
        raise DataError(
            f"{path}: cut off: its index ends at byte {last.pos + last.size}, the file at {size}; copy it again"
        )
