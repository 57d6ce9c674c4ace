"""Frames out of files and into files: decord and PyAV behind one protocol, image folders, still images, and the writer. No torch."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mindspeed_mm.errors import DataError
from mindspeed_mm.files import atomic_path

Frames = NDArray[np.uint8]  # [T, H, W, 3]
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
WHITE, BLACK = 255, 0
_INDEXED = {"mp4", "matroska"}
_SAME_COLOURS = {"yuv420p", "yuvj420p", "yuv444p", "yuvj444p", "gbrp", "rgb24", "bgr0", "gray"}  # even sizes only
_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
_UNTIMED_FPS = 16.0  # what image folders are shown at; they carry no clock


class VideoReader(Protocol):
    """A clip that is open. Frames are numbered from 0 in the order in which they are shown."""

    path: Path
    num_frames: int
    height: int  # as shown: after rotation
    width: int
    fps: float  # the mean rate
    times: list[float]  # when each frame comes on, in seconds from the first
    duration: float  # when the last frame goes off
    timed: bool  # False for images: they have an order, but no clock

    def read(self, indices: Sequence[int]) -> Frames:
        """The frames at `indices` (any order, repeats allowed). Raises DataError when one cannot be decoded."""
        ...


def open_video(
    path: str | Path, reader: Literal["decord", "av"] = "av", *, background: int = WHITE, threads: int = 1
) -> VideoReader:
    """Open a video file, an image, or a folder of images. Transparent pixels are laid on `background`.

    Raises DataError for what is missing, no video, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageReader(path, background)
    refuse_text(path)
    if reader == "decord" and decord_is_exact(path):
        try:
            return DecordReader(path, threads)
        except DataError:
            pass  # decord knows fewer formats and stumbles over some small widths; PyAV gives the same frames, or the reason
    return AvReader(path, threads)


def refuse_text(path: Path) -> None:
    """Raise DataError for a text with a video's name. FFmpeg would draw it as a terminal, or follow it as a playlist."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise DataError(f"{path}: the file is empty")
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head) and not head.startswith(b"YUV4MPEG"):
        raise DataError(f"{path}: a text, not a video; it begins with {head[:24].decode('utf-8', 'replace')!r}")


def decord_is_exact(path: Path) -> bool:
    """Whether decord gives this file's frames as PyAV does, to the bit. Packets are read, and one frame is decoded.

    It spreads chroma over pixels in another way at odd sizes, with more than 8 bits, in a turned 4:2:2, and in interlaced
    frames (the first one tells: mpeg2's container may not). After a jump it miscounts in formats without an index, where
    time stamps are missing or cut by an edit list, and in open groups of pictures (x265's default), where frames that lean
    on the group before are dropped after a seek and all later ones shift.
    """
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            if not _INDEXED & set(container.format.name.split(",")):
                return False
            codec = stream.codec_context
            if codec.pix_fmt not in _SAME_COLOURS or codec.width % 2 or codec.height % 2:
                return False
            key, looked = None, False
            for packet in container.demux(stream):
                if not looked and (frames := packet.decode()):
                    looked = True
                    if frames[0].interlaced_frame:
                        return False
                if not packet.size:
                    continue
                if packet.pts is None or packet.is_discard or (key is not None and packet.pts < key):
                    return False
                key = packet.pts if packet.is_keyframe else key
            return True
    except (av.error.FFmpegError, IndexError):
        return False


class DecordReader:
    """decord: applies rotation by itself; keeps many decoded frames in memory."""

    timed = True

    def __init__(self, path: Path, threads: int = 1) -> None:
        import decord

        self.path = path
        decord.logging.set_level(decord.logging.QUIET)
        try:
            # fault_tol: one frame that had to be made up is one too many
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=threads, fault_tol=1e-9)
            self.num_frames = len(self._reader)
            stamps = self._reader.get_frame_timestamp(range(self.num_frames)).astype(np.float64)
            first: Frames = self._reader.get_batch([0]).asnumpy()
        except Exception as error:  # decord raises RuntimeError, DECORDError and AssertionError alike
            raise DataError(f"{path}: cannot be opened as a video: {short(error)}") from None
        self.height, self.width = first.shape[1:3]
        self.times = [round(float(t), 6) for t in stamps[:, 0] - stamps[0, 0]]
        self.duration, self.fps = clock(self.times, float(stamps[-1, 1] - stamps[-1, 0]))

    def read(self, indices: Sequence[int]) -> Frames:
        """Frames at `indices`, uint8 [T, H, W, 3]."""
        _check_range(self, indices)
        try:
            frames: Frames = self._reader.get_batch(list(indices)).asnumpy()
        except Exception as error:
            raise DataError(f"{self.path}: frames {_span(indices)} cannot be decoded: {short(error)}") from None
        return frames


class AvReader:
    """PyAV: reads whatever FFmpeg reads, one frame in memory at a time."""

    timed = True

    def __init__(self, path: Path, threads: int = 1) -> None:
        import av

        self.path = path
        self._threads = threads
        try:
            self._open()
            self._stamps, self._keys, last = index_frames(self._container, self._stream)
            self._places = {stamp: place for place, stamp in enumerate(self._stamps)}
            first = self._decode(0)
            base = float(self._stream.time_base)
        except DataError:
            raise
        except (av.error.FFmpegError, IndexError) as error:  # IndexError: no video stream
            raise DataError(f"{path}: cannot be opened as a video: {short(error)}") from None
        self.num_frames = len(self._stamps)
        self.height, self.width = first.shape[:2]
        self.times = [round((stamp - self._stamps[0]) * base, 6) for stamp in self._stamps]
        self.duration, self.fps = clock(self.times, last * base)

    def _open(self) -> None:
        import av

        self._container: Any = av.open(str(self.path), metadata_errors="ignore")
        self._stream: Any = self._container.streams.video[0]
        self._stream.codec_context.thread_count = self._threads
        self._counted = "avi" in self._container.format.name.split(
            ","
        )  # its stamps are in order of decoding, not showing
        self._next = -1  # the frame that the decoder gives next; -1 = not known
        self._frames: Iterator[Any] = iter(())

    def read(self, indices: Sequence[int]) -> Frames:
        """Frames at `indices`, uint8 [T, H, W, 3]."""
        import av

        _check_range(self, indices)
        frames = {}
        for index in sorted(set(indices)):
            try:
                frames[index] = self._decode(index)
            except av.error.FFmpegError as error:
                self._next = -1
                raise DataError(f"{self.path}: frame {index} cannot be decoded: {short(error)}") from None
        return np.stack([frames[index] for index in indices])

    def _decode(self, index: int) -> Frames:
        """[H, W, 3]; goes to the key frame before `index` where that is shorter, or the only way back."""
        key = self._keys[max(0, bisect_right(self._keys, index) - 1)]
        if not self._counted and (self._next < 0 or index < self._next or key > self._next):
            self._container.seek(self._stamps[key], stream=self._stream, backward=True, any_frame=False)
            self._frames = self._container.decode(self._stream)
        frame = None if self._counted and not 0 <= self._next <= index else self._advance(index)
        if frame is None:  # some formats seek behind the place, AVI cannot tell where it is: begin again
            self._container.close()
            self._open()
            self._frames, self._next = self._container.decode(self._stream), 0
            frame = self._advance(index)
        if frame is None:
            total = len(self._stamps)
            raise DataError(f"{self.path}: frame {index} of {total} cannot be decoded: the file is cut off or damaged")
        return upright(frame)

    def _advance(self, index: int) -> Any:
        """Decode on to the frame at `index`; None when it does not come, or comes damaged."""
        for frame in self._frames:
            place = self._next if self._counted else self._places.get(frame.pts if frame.pts is not None else frame.dts)
            self._next = self._next if place is None else place + 1
            if place is not None and place >= index:
                if place == index and not getattr(frame, "is_corrupt", False):
                    return frame
                break
        self._next = -1
        return None


def index_frames(container: Any, stream: Any) -> tuple[list[int], list[int], int]:
    """Time stamps of all frames in showing order, places of the key frames, and how long the last frame stays. No decoding."""
    packets = []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None and packet.size and not packet.is_discard:
            packets.append((stamp, packet.is_keyframe, packet.duration or 0))
    if not packets:
        raise DataError(f"{container.name}: there are no frames in it")
    packets.sort()
    keys = [place for place, (_, is_key, _) in enumerate(packets) if is_key]
    return [stamp for stamp, _, _ in packets], keys or [0], packets[-1][2]


def upright(frame: Any) -> Frames:
    """The frame in RGB, turned as its display matrix says (phones film lying down)."""
    image: Frames = frame.to_ndarray(format="rgb24")
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


class ImageReader:
    """A still image, or a folder of images in the order of the numbers in their names."""

    timed = False

    def __init__(self, path: Path, background: int = WHITE) -> None:
        self.path = path
        self._background = background
        self._files = [path]
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
            self._files = sorted(files, key=_natural)
        if not self._files:
            raise DataError(f"{path}: no images in this folder")
        self.num_frames = len(self._files)
        self.height, self.width = read_image(self._files[0], background).shape[:2]
        self.fps = _UNTIMED_FPS
        self.times = [i / self.fps for i in range(self.num_frames)]
        self.duration = self.num_frames / self.fps

    def read(self, indices: Sequence[int]) -> Frames:
        """Frames at `indices`, uint8 [T, H, W, 3]."""
        _check_range(self, indices)
        frames = [read_image(self._files[index], self._background) for index in indices]
        for index, frame in zip(indices, frames, strict=True):
            if frame.shape != (self.height, self.width, 3):
                raise DataError(
                    f"{self._files[index]}: {frame.shape[1]}x{frame.shape[0]} pixels, but the first image of the folder "
                    f"has {self.width}x{self.height}; give all one size"
                )
        return np.stack(frames)


def read_image(path: str | Path, background: int = WHITE) -> Frames:
    """An image file as RGB [H, W, 3]: turned upright (EXIF), 16-bit brought to 8, transparent pixels laid on `background`."""
    try:
        with Image.open(path) as file:
            return flatten(ImageOps.exif_transpose(file), background)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError
        raise DataError(f"{path}: cannot be read as an image: {short(error)}") from None


def flatten(image: Image.Image, background: int = WHITE) -> Frames:
    """A Pillow image of any mode as RGB [H, W, 3] on `background`."""
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((wide / (257.0 if wide.max() > 255 else 1.0)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def write_video(
    path: str | Path, frames: Frames | Iterable[Frames], fps: float, *, lossless: bool = False, quality: int = 17
) -> Path:
    """Write RGB frames [T, H, W, 3] (or an iterable of [H, W, 3]) at exactly `fps`; the file appears when it is complete.

    .mp4 and .mov are H.264, lossless: RGB H.264 with nothing lost; .mkv is H.264, lossless: FFV1. `quality` is H.264's CRF:
    0 best, 17 hardly visible, 51 worst. Sizes are made even by repeating the last row or column (not when lossless).
    """
    import av

    path = Path(path)
    container_format = _CONTAINERS.get(path.suffix.lower())
    if container_format is None:
        raise DataError(f"{path}: cannot write a video of this name; use .mp4, .mov or .mkv")
    try:
        with atomic_path(path) as draft, av.open(str(draft), "w", format=container_format) as container:
            _encode(container, iter(frames), fps, _codec(container_format, lossless), quality)
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be written: {short(error)}") from None
    return path


def _codec(container_format: str, lossless: bool) -> tuple[str, str]:
    """Codec and pixel format."""
    if not lossless:
        return "libx264", "yuv420p"
    return ("ffv1", "bgr0") if container_format == "matroska" else ("libx264rgb", "rgb24")


def _encode(container: Any, frames: Iterator[Frames], fps: float, codec: tuple[str, str], quality: int) -> None:
    import av
    from av.video.reformatter import VideoReformatter

    stream: Any = None
    even = codec[1] == "yuv420p"
    converter = VideoReformatter()  # one for all frames: it keeps its tables
    for frame in frames:
        frame = _even(frame) if even else np.ascontiguousarray(frame)
        if stream is None:
            stream = container.add_stream(codec[0], rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frame.shape[:2]
            stream.pix_fmt = codec[1]
            if codec[0] != "ffv1":
                stream.options = {"crf": str(quality if even else 0), "preset": "medium"}
            if even:
                _tell_colours(stream.codec_context)
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        if even:  # a chroma sample is the mean of its four pixels: the default, a wider kernel, washes out edges
            picture = converter.reformat(picture, format=codec[1], interpolation="AREA")
        container.mux(stream.encode(picture))
    if stream is None:
        raise DataError("a video needs at least one frame")
    container.mux(stream.encode(None))


def _tell_colours(codec: Any) -> None:
    """Name the conversion that RGB goes through here. Without it players guess, and guess another one for HD: colours shift."""
    codec.colorspace = 6  # BT.601's matrix, swscale's default; numbers of ITU-T H.273
    codec.color_range = 1  # limited
    codec.color_primaries = codec.color_trc = 1  # BT.709, as sRGB nearly is


def _even(frame: Frames) -> Frames:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def clock(times: Sequence[float], last: float) -> tuple[float, float]:
    """When the clip ends, and its mean frame rate. `last`: how long the last frame stays, 0 = not known."""
    mean = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    if mean and not 0 < last < 10 * mean:
        last = mean
    last = last or 1 / _UNTIMED_FPS
    return times[-1] + last, round(1 / (mean or last), 3)


def _check_range(reader: VideoReader, indices: Sequence[int]) -> None:
    if not len(indices) or min(indices) < 0 or max(indices) >= reader.num_frames:
        raise DataError(f"{reader.path}: frames {_span(indices)} asked of a clip with {reader.num_frames}")


def _span(indices: Sequence[int]) -> str:
    return f"{min(indices)}..{max(indices)}" if len(indices) else "(none)"


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """frame_2 before frame_10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name)]


def short(error: Exception) -> str:
    """The first line of a library's error, without its number and the file's name, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return re.sub(r"^\[Errno \d+\] |: '.*'$|^\[[\d:]+\] \S+: ", "", text)[:160]
