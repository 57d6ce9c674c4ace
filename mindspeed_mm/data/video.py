"""Video readers: decord and PyAV behind one protocol. Does not import torch.

`clips.py` decides which files are clips, and `images.py` reads images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.data.clips import describe_error, open_clip
from mindspeed_mm.data.frames import check_range, span
from mindspeed_mm.data.image_readers import AnimationReader, ImageReader, is_animation
from mindspeed_mm.data.images import (
    BLACK,
    IMAGE_SUFFIXES,
    UNTIMED_FPS,
    WHITE,
    Frames,
    flatten,
    read_image,
    short,
)
from mindspeed_mm.data.packets import decode_frames, list_frames, size_change
from mindspeed_mm.data.pictures import clip_traits, has_alpha, mask_trait, to_mask, to_rgb
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import regular_file

__all__ = [
    "BLACK",
    "IMAGE_SUFFIXES",
    "WHITE",
    "AvReader",
    "DecordReader",
    "Frames",
    "ImageReader",
    "VideoReader",
    "clock",
    "flatten",
    "open_video",
    "read_image",
    "short",
]
_INDEXED = {"mp4", "matroska"}
# Pixel formats that decord converts as PyAV does, at even sizes only.
_SAME_COLOURS = {
    "yuv420p",
    "yuvj420p",
    "yuv444p",
    "yuvj444p",
    "gbrp",
    "rgb24",
    "bgr0",
    "gray",
}
_RESIZED_IN_BAND = {"vp8", "vp9", "av1"}  # size may change, as in recorded calls; decord rescales silently


class VideoReader(Protocol):
    """An open clip. Frames are numbered from 0 in presentation order."""

    path: Path
    num_frames: int
    height: int  # as shown: after rotation
    width: int
    fps: float  # the mean rate
    times: list[float]  # start time of each frame, in seconds from the first frame
    duration: float  # end time of the last frame in seconds
    timed: bool  # False for images, which have an order but no timestamps

    @property
    def traits(self) -> tuple[str, ...]:
        """Notable facts about how the clip is read; see `traits.py`."""
        ...

    def read(self, indices: Sequence[int]) -> Frames:
        """Read the frames at `indices` (any order, repeats allowed).

        Raises DataError if a frame cannot be decoded.
        """
        ...


def open_video(
    path: str | Path,
    reader: Literal["decord", "av"] = "av",
    *,
    background: int = WHITE,
    mask: bool = False,
    threads: int = 1,
) -> VideoReader:
    """Open a video file, an image, or a folder of images.

    Transparent pixels are blended with `background`, or with black for a `mask`. Raises DataError for a file
    that is missing, damaged, or not a video.
    """
    path = regular_file(path, DataError, or_folder=True)
    background = BLACK if mask else background
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        if is_animation(path):
            return AnimationReader(path, background, mask=mask)
        return ImageReader(path, background, mask=mask)
    if reader == "decord" and decord_is_exact(path):
        try:
            return DecordReader(path, threads)
        except DataError:
            # decord supports fewer formats and fails on some small widths. PyAV returns the same frames or
            # raises an error with the reason.
            pass
    return AvReader(path, threads, background, mask=mask)


def decord_is_exact(path: Path) -> bool:
    """Return whether decord and PyAV return bit-identical frames for this file.

    Reads packets and decodes one frame.

    decord interpolates chroma differently at odd sizes, above 8 bits, in rotated 4:2:2, and in interlaced
    frames. The first frame reveals interlacing; the container of MPEG-2 may not. After a seek, decord
    miscounts frames in formats without an index, and where timestamps are missing, repeat or are cut by an
    edit list. It also miscounts in open groups of pictures (the default of x265): frames that reference the
    previous group are dropped after a seek, and all later indices shift. decord always reads the first
    stream, does not mirror, and rescales frames of another size.
    """
    import av

    try:
        container, stream = open_clip(path)
        with container:
            if (
                not _INDEXED & set(container.format.name.split(","))
                or stream.index != container.streams.video[0].index
            ):
                return False
            codec = stream.codec_context
            if codec.pix_fmt not in _SAME_COLOURS or codec.width % 2 or codec.height % 2:
                return False
            if codec.codec.canonical_name in _RESIZED_IN_BAND:
                return False
            table = list_frames(container, stream)
        if table.by_place or table.resized or not table.closed or table.stamps[0] is None:
            return False
        container, stream = open_clip(path)
        with container:
            first = next(container.decode(stream))
            return not clip_traits(container, stream, first, table)
    except (DataError, StopIteration, av.error.FFmpegError):
        return False


class DecordReader:
    """Reader based on decord, only for clips without traits.

    decord applies rotation itself and keeps many decoded frames in memory.
    """

    timed = True
    traits: tuple[str, ...] = ()

    def __init__(self, path: Path, threads: int = 1) -> None:
        import decord

        self.path = path
        decord.logging.set_level(decord.logging.QUIET)
        try:
            # fault_tol: do not accept a single frame that decord had to substitute.
            self._reader = decord.VideoReader(
                str(path), ctx=decord.cpu(0), num_threads=threads, fault_tol=1e-9
            )
            self.num_frames = len(self._reader)
            stamps = self._reader.get_frame_timestamp(range(self.num_frames)).astype(np.float64)
            first: Frames = self._reader.get_batch([0]).asnumpy()
        except Exception as error:  # decord raises RuntimeError, DECORDError or AssertionError
            raise DataError(f"cannot be opened as a video: {short(error)}", where=path) from None
        self.height, self.width = first.shape[1:3]
        self.times = [round(float(t), 6) for t in stamps[:, 0] - stamps[0, 0]]
        self.duration, self.fps = clock(self.times, float(stamps[-1, 1] - stamps[-1, 0]))

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at `indices`, uint8 [T, H, W, 3]."""
        check_range(self.path, self.num_frames, indices)
        try:
            frames: Frames = self._reader.get_batch(list(indices)).asnumpy()
        except Exception as error:
            raise DataError(
                f"frames {span(indices)} cannot be decoded: {short(error)}", where=self.path
            ) from None
        return frames


class AvReader:
    """Reader based on PyAV. It supports every format of FFmpeg and keeps one frame in memory at a time."""

    timed = True

    def __init__(self, path: Path, threads: int = 1, background: int = WHITE, *, mask: bool = False) -> None:
        import av

        self.path = path
        self._threads, self._background = threads, background
        try:
            self._open()
            self._table = list_frames(self._container, self._stream)
            self._places = {stamp: index for index, stamp in enumerate(self._table.stamps)}
            self.num_frames = len(self._table.stamps)
            self.height = self.width = 0
            frame = self._decode(0)
        except DataError:
            raise
        except av.error.FFmpegError as error:
            raise describe_error(path, error) from None
        self._size = (frame.width, frame.height)
        self.height, self.width = to_rgb(frame).shape[:2]
        self._mask = mask_trait(path) if mask and has_alpha(frame) else ""
        self.traits = clip_traits(self._container, self._stream, frame, self._table, mask=self._mask)
        self.times = self._table.times
        self.duration, self.fps = clock(self.times, self._table.last)

    def _open(self) -> None:
        self._container: Any
        self._stream: Any
        self._container, self._stream = open_clip(self.path)
        self._stream.codec_context.thread_count = self._threads
        self._next = -1  # index of the frame that the decoder returns next; -1 = unknown
        self._frames: Iterator[Any] = iter(())

    def read(self, indices: Sequence[int]) -> Frames:
        """Return the frames at `indices`, uint8 [T, H, W, 3]."""
        import av

        check_range(self.path, self.num_frames, indices)
        frames = {}
        for index in sorted(set(indices)):
            try:
                frame = self._decode(index)
                frames[index] = self._picture(frame)
            except av.error.FFmpegError as error:
                self._next = -1
                raise DataError(f"frame {index} cannot be decoded: {short(error)}", where=self.path) from None
            if (frame.width, frame.height) != self._size:
                raise DataError(size_change(index, (frame.width, frame.height), self._size), where=self.path)
        return np.stack([frames[index] for index in indices])

    def _picture(self, frame: Any) -> NDArray[np.uint8]:
        return to_mask(frame, self._mask) if self._mask else to_rgb(frame, self._background)

    def _decode(self, index: int) -> Any:
        """Decode the frame at `index`.

        Seeks to the key frame before `index` if that is faster, or if the frame has already passed.
        """
        keys, stamps, counted = self._table.keys, self._table.stamps, self._table.by_place
        key = keys[max(0, bisect_right(keys, index) - 1)]
        if not counted and (self._next < 0 or index < self._next or key > self._next):
            self._container.seek(stamps[key], stream=self._stream, backward=True, any_frame=False)
            self._frames = decode_frames(self._container, self._stream)
        frame = None if counted and not 0 <= self._next <= index else self._advance(index)
        if frame is None:  # some formats seek too far, and AVI does not report its position: start over
            self._container.close()
            self._open()
            self._frames, self._next = decode_frames(self._container, self._stream), 0
            frame = self._advance(index)
        if frame is None:
            raise DataError(
                f"frame {index} of {self.num_frames} cannot be decoded: the file is cut off or damaged",
                where=self.path,
            )
        return frame

    def _advance(self, index: int) -> Any:
        """Decode up to the frame at `index`. Returns None if the frame is missing or damaged."""
        by_place = self._table.by_place
        for frame in self._frames:
            if by_place and self._next == 0 and self._table.skipped and frame.pts != self._table.stamps[0]:
                continue  # references frames before the beginning of the file
            stamp = frame.pts if frame.pts is not None else frame.dts
            place = self._next if by_place else self._places.get(stamp)
            self._next = self._next if place is None else place + 1
            if place is not None and place >= index:
                if place == index and not getattr(frame, "is_corrupt", False):
                    return frame
                break
        self._next = -1
        return None


def clock(times: Sequence[float], last: float) -> tuple[float, float]:
    """Return the end of the clip in seconds and its mean frame rate.

    `last` is the duration of the last frame in seconds; 0 = unknown.
    """
    mean = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    if mean and not 0 < last < 10 * mean:
        last = mean
    last = last or 1 / UNTIMED_FPS
    return times[-1] + last, round(1 / (mean or last), 3)
