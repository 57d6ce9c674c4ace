"""What a video file is: which stream, which frames and when, which way up, what lies under alpha. No torch.

The check, both readers and the feature key all ask here, so that they cannot disagree.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.data.images import WHITE, check_pixels, short
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import display_path, regular_file

AV_FLOOR = 17  # below, BT.709 is read with BT.601's matrix; below 15, rotation is ignored
_PQ, _HLG = 16, 18  # transfer functions of ITU-T H.273
_STILL_FORMATS = ("image2", "png", "apng", "jpeg", "bmp", "webp", "tiff", "ppm", "pgm", "gif_pipe")
_SHORT_OF = 0.9  # of the length that a header names; players round, cut and pad by less
_SAMPLED_KEYS = 4  # key frames whose size is compared


def check_av_version() -> None:
    """Raise ConfigError for a PyAV that reads clips otherwise. Imports nothing."""
    try:
        version = importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"PyAV is not installed; clips need it: pip install 'av>={AV_FLOOR}'") from None
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < AV_FLOOR:
        raise ConfigError(
            f"PyAV {version} is installed; expected {AV_FLOOR} or newer, as older ones read colours and rotation "
            f"otherwise: pip install 'av>={AV_FLOOR}'"
        )


def open_clip(path: Path) -> tuple[Any, Any]:
    """A video file's container and the stream that a player plays. The caller closes the container.

    Raises DataError for what is no video; FFmpeg's own errors pass.
    """
    import av

    check_av_version()
    regular_file(path, DataError)
    refuse_text(path)
    container: Any = av.open(str(path), metadata_errors="ignore")
    try:
        _refuse_still(path, container)
        stream = _choose_stream(path, container)
        if stream.codec_context is None:
            raise DataError(
                f"{display_path(path)}: its video stream has a codec that FFmpeg does not know; is it damaged?"
            )
        check_pixels(path, stream.codec_context.width or 0, stream.codec_context.height or 0)
    except BaseException:
        container.close()
        raise
    return container, stream


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


def _refuse_still(path: Path, container: Any) -> None:
    name = container.format.name.removesuffix("_pipe")
    if name in _STILL_FORMATS:
        kind = {"image2": "", "jpeg": "JPEG "}.get(name, f"{name.upper()} ")
        raise DataError(f"{display_path(path)}: a {kind}image with a video's name; rename it to what it is")


def _choose_stream(path: Path, container: Any) -> Any:
    """The first default stream that is no cover, thumbnail or still picture."""
    streams = list(container.streams.video)
    if not streams:
        raise DataError(f"{display_path(path)}: there is no video in it")
    moving = [stream for stream in streams if not _is_cover(stream)]
    if not moving:
        raise DataError(f"{display_path(path)}: there is no video in it, only a cover picture")
    if len(moving) > 1:
        counts = _count_packets(container, moving)
        moving = [stream for stream in moving if counts[stream.index] > 1] or moving
    from av.stream import Disposition

    return next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])


def _is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    cover = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
    return bool(stream.disposition & cover)


def _count_packets(container: Any, streams: Sequence[Any]) -> dict[int, int]:
    if all(stream.frames for stream in streams):
        return {stream.index: stream.frames for stream in streams}
    counts = {stream.index: 0 for stream in streams}
    for packet in container.demux(*streams):
        counts[packet.stream_index] += bool(packet.size)
        if min(counts.values()) > 1:
            break
    container.seek(0)
    return counts


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """The frames of a clip in the order in which a player plays them."""

    stamps: list[int | None]  # as the file has them, in units of the stream's time base
    times: list[float]  # seconds from the first frame, never falling
    keys: list[int]  # places of the key frames
    last: float  # seconds that the last frame stays, 0 = not known
    by_place: bool  # stamps repeat, start over or lack: only the place names a frame
    skipped: int = 0  # frames in front of the first key frame, which cannot be decoded


def list_frames(container: Any, stream: Any) -> FrameTable:
    """Demuxes the whole file, decodes nothing. Raises DataError for a clip without frames."""
    found: list[tuple[int, int | None, bool, int]] = []  # part, stamp, is key, duration
    part, highest, first_key, lead = 0, None, None, 0
    started = False
    for packet in container.demux(stream):
        if not packet.size:
            continue
        started = started or packet.is_keyframe
        if packet.is_discard:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if not started:
            lead += 1
        elif lead and first_key is None and packet.is_keyframe:
            first_key = len(found)
        if stamp is not None and highest is not None and packet.is_keyframe and stamp < highest:
            part, highest = part + 1, None  # files joined by `cat`: no frame before a key frame is played after it
        highest = stamp if stamp is not None and (highest is None or stamp > highest) else highest
        found.append((part, stamp, packet.is_keyframe, packet.duration or 0))
    if first_key is not None:
        bound = found[first_key][1]
        kept = [entry for entry in found[first_key:] if entry[0] or bound is None or (entry[1] or 0) >= bound]
        lead, found = len(found) - len(kept), kept
    else:
        lead = 0
    if not found:
        raise DataError(f"{container.name}: there are no frames in it")
    return _table(found, stream, lead)


def _table(found: list[tuple[int, int | None, bool, int]], stream: Any, skipped: int) -> FrameTable:
    base = stream.time_base or Fraction(1, 1000)
    if any(stamp is None for _, stamp, _, _ in found):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        times = [round(place / rate, 6) for place in range(len(found))]
        return FrameTable(
            stamps=[None] * len(found), times=times, keys=[0], last=1 / rate, by_place=True, skipped=skipped
        )
    found.sort(key=lambda entry: (entry[0], entry[1]))
    stamps = [stamp for _, stamp, _, _ in found if stamp is not None]
    parts = [part for part, _, _, _ in found]
    repeated = any(a == b for a, b in pairwise(stamps))
    keys = [place for place, (_, _, is_key, _) in enumerate(found) if is_key]
    return FrameTable(
        stamps=list(stamps),
        times=[round(ticks * float(base), 6) for ticks in _joined(stamps, parts, [entry[3] for entry in found])],
        keys=keys or [0],
        last=found[-1][3] * float(base),
        by_place=repeated or parts[-1] > 0 or "avi" in stream.container.format.name.split(","),
        skipped=skipped,
    )


def _joined(stamps: Sequence[int], parts: Sequence[int], durations: Sequence[int]) -> list[int]:
    """Ticks from the first frame; each part that starts over goes on where the one before ends."""
    ticks: list[int] = []
    shift = -stamps[0]
    for place, stamp in enumerate(stamps):
        if place and parts[place] != parts[place - 1]:
            step = durations[place - 1] or (ticks[-1] - ticks[-2] if place > 1 else 1)
            shift = ticks[-1] + step - stamp
        ticks.append(stamp + shift)
    return ticks


def to_rgb(frame: Any, background: int = WHITE) -> NDArray[np.uint8]:
    """A decoded frame as RGB [H, W, 3], turned and mirrored by its display matrix, transparent pixels on `background`."""
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    if has_alpha(frame):
        alpha = frame.to_ndarray(format="rgba")[..., 3:]
        if alpha.min() < 255:
            weight = alpha.astype(np.float32) / 255
            image = np.asarray((image * weight + background * (1 - weight)).round().astype(np.uint8))
    across, down, swapped = orientation(frame)
    image = image.swapaxes(0, 1) if swapped else image
    image = image[:, ::-1] if across else image
    return np.ascontiguousarray(image[::-1] if down else image)


def has_alpha(frame: Any) -> bool:
    """Whether the pixel format carries transparency."""
    return any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """Whether the picture is to be flipped left to right and top to bottom, after its axes were swapped."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return a < 0, d < 0, False
    return c < 0, b < 0, True


def is_mirrored(frame: Any) -> bool:
    """Whether the display matrix turns the picture over: no rotation does that."""
    across, down, swapped = orientation(frame)
    return (across != down) != swapped


def find_size_change(container: Any, stream: Any, keys: Sequence[tuple[int, int | None]], first: Any) -> str:
    """Compare the size of a few key frames (place, stamp) with the first frame's; '' or what is wrong. Decodes them."""
    keys = [key for key in keys if key[1] is not None][1:]
    count = min(len(keys), _SAMPLED_KEYS)
    sampled = {keys[-1 - i * len(keys) // count] for i in range(count)} if count else set()
    for place, stamp in sorted(sampled):
        if (size := _size_at(container, stream, stamp)) not in (None, (first.width, first.height)):
            for place_before, stamp_before in keys:
                if (found := _size_at(container, stream, stamp_before)) not in (None, (first.width, first.height)):
                    place, size = place_before, found
                    break
            return size_change(place, size or (0, 0), (first.width, first.height))
    return ""


def find_size_change_by_place(container: Any, stream: Any, keys: Sequence[int]) -> str:
    """`find_size_change` for a clip just opened in which stamps name no frame: decodes every key frame in order."""
    stream.codec_context.skip_frame = "NONKEY"
    first = None
    for place, frame in zip(keys, container.decode(stream), strict=False):
        first = first or (frame.width, frame.height)
        if (frame.width, frame.height) != first:
            return size_change(place, (frame.width, frame.height), first)
    return ""


def _size_at(container: Any, stream: Any, stamp: int | None) -> tuple[int, int] | None:
    container.seek(stamp, stream=stream, backward=True, any_frame=False)
    for frame in container.decode(stream):
        if frame.pts is None or (frame.key_frame and frame.pts >= (stamp or 0)):
            return frame.width, frame.height
    return None


def size_change(place: int, found: tuple[int, int], first: tuple[int, int]) -> str:
    """The message for a frame (width, height) that is not as large as the first one."""
    return (
        f"the picture's size changes: frame {place} is {found[0]}x{found[1]}, frame 0 {first[0]}x{first[1]}; "
        "cut the clip there, or encode it again at one size"
    )


def clip_traits(container: Any, stream: Any, first: Any, table: FrameTable | None) -> tuple[str, ...]:
    """What is remarkable about a clip; see `traits.py`. `table` is None where the container's own index is exact."""
    found = []
    others = [other for other in container.streams.video if other.index != stream.index and not _is_cover(other)]
    if stream.index != container.streams.video[0].index:
        found.append("later stream")
    elif others:
        found.append("streams")
    if table is not None:
        found += ["untimed"] if table.stamps[0] is None else ["repeats"] if _repeats(table) else []
        found += ["lead"] if table.skipped else []
        found += ["short"] if _is_shorter(container, stream, table) else []
    found += ["mirrored"] if is_mirrored(first) else []
    found += ["alpha"] if has_alpha(first) else []
    found += ["no alpha"] if stream.metadata.get("alpha_mode") == "1" and not has_alpha(first) else []
    found += ["interlaced"] if first.interlaced_frame else []
    found += ["hdr"] if int(first.color_trc or 0) in (_PQ, _HLG) else []
    return tuple(found)


def _repeats(table: FrameTable) -> bool:
    return any(a is not None and b is not None and b <= a for a, b in pairwise(table.stamps))


def _is_shorter(container: Any, stream: Any, table: FrameTable) -> bool:
    """Whether frames end before the length that the header gives the stream."""
    said = _clock(stream.metadata.get("DURATION", ""))
    if not said and stream.duration:
        said = float(stream.duration * stream.time_base)
    if not said and len(container.streams) == 1 and container.duration and "matroska" in container.format.name:
        said = container.duration / 1_000_000
    return bool(said) and table.times[-1] + table.last < _SHORT_OF * said - 0.1


def _clock(text: str) -> float:
    """Seconds of `00:00:02.000000000`; 0 for anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def describe_error(path: Path, error: Exception) -> DataError:
    """FFmpeg's complaint with the file's name."""
    return DataError(f"{display_path(path)}: cannot be opened as a video: {short(error)}")
