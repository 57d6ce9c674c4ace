"""Frame tables of video files, built from their packets. Does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

from mindspeed_mm.data.bitstream import SizeWatch, may_end_inside_a_frame, packet_head
from mindspeed_mm.data.clips import open_clip
from mindspeed_mm.errors import DataError

# Container formats in which FFmpeg marks a packet as corrupt when the file ends inside it.
_CUT_IS_FLAGGED = frozenset({"mp4", "flv", "mpeg", "avi", "ivf"})
# Container formats that store the length of each frame. FFmpeg drops or marks a frame cut by the end of
# the file. In other formats, only decoding detects the cut.
_CUT_IS_SEEN = frozenset({"mp4", "flv", "avi", "ivf", "matroska", "yuv4mpegpipe"})
# Codecs whose decoders conceal a truncated slice without marking the frame.
_TEARS_ARE_HIDDEN = frozenset({"hevc", "vvc"})
_AFTER_A_SLICE = b"\x55" * 64  # changes how a truncated slice decodes; a complete slice encodes its end
_REORDERED = 16  # maximum number of frames shown after the last frame in the file
ASSUMED_FPS = 25  # frame rate that FFmpeg and players assume for a raw stream without one


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """The frames of a clip in presentation order."""

    stamps: list[int | None]  # as stored in the file, in units of the stream's time base
    times: list[float]  # seconds from the first frame, non-decreasing
    keys: list[int]  # indices of the key frames
    last: float  # duration of the last frame in seconds; 0 = unknown
    by_place: bool  # stamps repeat, restart or are missing: only the index identifies a frame
    skipped: int = 0  # frames before the first key frame, which cannot be decoded
    cut: bool = False  # the file ends inside a frame, which is excluded
    closed: bool = True  # every frame is shown, and none before its preceding key frame
    resized: bool = False  # key frames may differ in size


def stream_rates(stream: Any) -> list[float]:
    """Return the frame rates in the header.

    The list is empty for a raw stream without a rate: its `average_rate` is only FFmpeg's guess.
    """
    own = [stream.codec_context.framerate] if is_raw(stream) else None
    rates = own or [stream.average_rate, stream.guessed_rate]
    return [float(rate) for rate in rates if rate]


def is_raw(stream: Any) -> bool:
    """Return whether the file is a raw codec stream, without a container or timestamps."""
    from av.format import Flags

    return bool(stream.container.format.flags & Flags.no_timestamps.value)


def has_index(stream: Any) -> bool:
    """Return whether the container lists every frame that its header counts."""
    entries = getattr(stream, "index_entries", None)
    return bool(stream.frames) and entries is not None and len(entries) == stream.frames


def _is_cut(container: Any, packet: Any) -> bool:
    if not packet.size or not packet.is_corrupt or has_index(packet.stream):
        return False  # with an index, the missing frames are errors
    return bool(_CUT_IS_FLAGGED & _names(container))


def _names(container: Any) -> set[str]:
    return set(container.format.name.split(","))


def decode_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decode frames from the current position of the container.

    When the end of the file cuts a packet, the frames before that packet are still returned.
    """
    import av

    failure: Exception | None = None
    for packet in container.demux(stream):
        if failure is not None and packet.size:
            raise failure
        if _is_cut(container, packet):
            yield from stream.decode(None)
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:  # in the last packet, it means a truncated file
            failure = error
            continue
        yield from frames


def list_frames(container: Any, stream: Any) -> FrameTable:
    """Build the frame table of a clip by demuxing the whole file.

    Decodes only the end of the file, and only where the format does not reveal a truncated frame. Raises
    DataError for a clip without frames.
    """
    found: list[tuple[int, int | None, bool, int]] = []  # part, stamp, is key, duration
    part, highest, first_key, lead = 0, None, None, 0
    started = cut = False
    closed, key, sizes = True, None, SizeWatch(stream.codec_context)
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if cut := _is_cut(container, packet):
            break
        started = started or packet.is_keyframe
        closed = closed and not packet.is_discard and (key is None or (packet.pts or 0) >= key)
        if packet.is_keyframe:
            key = packet.pts
            sizes.add(packet_head(packet))
        sizes.unsure |= len(found) > 0 and packet.has_sidedata("new_extradata")
        if packet.is_discard:
            continue
        stamp = packet.pts if packet.pts is not None else packet.dts
        if not started:
            lead += 1
        elif lead and first_key is None and packet.is_keyframe:
            first_key = len(found)
        if stamp is not None and highest is not None and packet.is_keyframe and stamp < highest:
            # Files joined by `cat`: no frame before a key frame is played after it.
            part, highest = part + 1, None
        highest = stamp if stamp is not None and (highest is None or stamp > highest) else highest
        found.append((part, stamp, packet.is_keyframe, packet.duration or 0))
    if first_key is not None:
        bound = found[first_key][1]
        kept = [entry for entry in found[first_key:] if entry[0] or bound is None or (entry[1] or 0) >= bound]
        lead, found = len(found) - len(kept), kept
    else:
        lead = 0
    if not found:
        raise DataError("video stream contains no frames", where=container.name)
    last = found[-1][1]  # the last frame in the file is not always the last one shown
    table = _table(found, stream, lead)
    table = replace(table, cut=cut, closed=closed, resized=sizes.unsure)
    if not cut and _may_be_cut(container, stream):
        path = Path(container.name)
        table = _end_before(table, _find_damaged_end(path, table, last))
        if not table.cut and stream.codec_context.codec.canonical_name in _TEARS_ARE_HIDDEN:
            table = _end_before(table, _find_torn_end(path, table))
    return table


def _may_be_cut(container: Any, stream: Any) -> bool:
    """Return whether the last frame must be decoded to check that it is complete."""
    if has_index(stream) or _CUT_IS_SEEN & _names(container):
        return False
    return container.format.name != "mpegts" or may_end_inside_a_frame(Path(container.name), stream.id)


def _find_damaged_end(path: Path, table: FrameTable, last: int | None) -> int | None:
    """Return the index of the file's last frame, with stamp `last`, if it is damaged or missing; else None.

    Decodes the last group of pictures, or the whole clip if its stamps do not identify frames.
    """
    if table.by_place or last is None:
        flags = _decoded(path, None, table)
        first = next((i for i, (_, whole) in enumerate(flags) if not whole), len(flags))
        return first if first < len(table.stamps) and first >= len(flags) - _REORDERED else None
    key = max((k for k in (table.stamps[i] for i in table.keys) if k is not None and k <= last), default=None)
    for start in (key, None):  # if the seek lands after the key frame, start at the beginning
        whole = {stamp for stamp, is_whole in _decoded(path, start, table) if is_whole}
        if key in whole:
            break
    return None if last in whole else table.stamps.index(last)


def _find_torn_end(path: Path, table: FrameTable) -> int | None:
    """Return the index of the first frame that changes when bytes are appended to the file's last slice.

    Returns None if that slice is complete.
    """
    container, stream = open_clip(path)
    with container:
        before: list[Any] = []  # the last group may reference frames of the previous one
        group: list[Any] = []
        for packet in container.demux(stream):
            if packet.size and packet.is_keyframe:
                before, group = group, []
            if packet.size:
                group.append(packet)
        whole, changed = (_decode_all(stream, [*before, *group], more) for more in (b"", _AFTER_A_SLICE))
    if len(whole) != len(changed):
        return len(table.stamps) - 1
    from_end = next(
        (len(whole) - i for i, pair in enumerate(zip(whole, changed, strict=True)) if len(set(pair)) > 1), 0
    )
    return max(1, len(table.stamps) - from_end) if from_end else None


def _decode_all(stream: Any, packets: Sequence[Any], more: bytes) -> list[bytes]:
    """Hash each frame decoded from `packets`, with the bytes `more` appended to the last packet."""
    import av

    codec = av.CodecContext.create(stream.codec_context.codec, "r")
    codec.extradata, codec.thread_count = stream.codec_context.extradata, 1
    frames = []
    for packet in [*packets[:-1], _longer(packets[-1], more), None]:
        with suppress(av.error.FFmpegError):
            frames += codec.decode(packet)
    return [hashlib.blake2b(frame.to_ndarray(format="rgb24"), digest_size=16).digest() for frame in frames]


def _longer(packet: Any, more: bytes) -> Any:
    import av

    longer = av.Packet(bytes(packet) + more)
    longer.pts, longer.dts, longer.time_base = packet.pts, packet.dts, packet.time_base
    return longer


def _decoded(path: Path, start: int | None, table: FrameTable) -> list[tuple[int | None, bool]]:
    """Return (stamp, is complete) of each frame from `start` on, counted as the readers count frames."""
    import av

    first = table.stamps[0] if table.by_place and table.skipped else None
    found: list[tuple[int | None, bool]] = []
    container, stream = open_clip(path)
    with container, suppress(av.error.FFmpegError):
        if start is not None:
            container.seek(start, stream=stream, backward=True)
        frames = decode_frames(container, stream)
        for frame in dropwhile(lambda frame: first is not None and frame.pts != first, frames):
            found.append((frame.pts if frame.pts is not None else frame.dts, not frame.is_corrupt))
    return found


def _end_before(table: FrameTable, end: int | None) -> FrameTable:
    if not end:
        return table
    keys = [key for key in table.keys if key < end]
    return replace(table, stamps=table.stamps[:end], times=table.times[:end], keys=keys, cut=True)


def _table(found: list[tuple[int, int | None, bool, int]], stream: Any, skipped: int) -> FrameTable:
    base = stream.time_base or Fraction(1, 1000)
    if any(stamp is None for _, stamp, _, _ in found):
        rate = next(iter(stream_rates(stream)), ASSUMED_FPS)
        times = [round(index / rate, 6) for index in range(len(found))]
        return FrameTable(
            stamps=[None] * len(found), times=times, keys=[0], last=1 / rate, by_place=True, skipped=skipped
        )
    found.sort(key=lambda entry: (entry[0], entry[1]))
    stamps = [stamp for _, stamp, _, _ in found if stamp is not None]
    parts = [part for part, _, _, _ in found]
    repeated = any(a == b for a, b in pairwise(stamps))
    keys = [index for index, (_, _, is_key, _) in enumerate(found) if is_key]
    return FrameTable(
        stamps=list(stamps),
        times=[
            round(ticks * float(base), 6) for ticks in _joined(stamps, parts, [entry[3] for entry in found])
        ],
        keys=keys or [0],
        last=found[-1][3] * float(base),
        by_place=repeated or parts[-1] > 0 or "avi" in stream.container.format.name.split(","),
        skipped=skipped,
    )


def _joined(stamps: Sequence[int], parts: Sequence[int], durations: Sequence[int]) -> list[int]:
    """Return ticks from the first frame. A part whose stamps restart continues after the previous one."""
    ticks: list[int] = []
    shift = -stamps[0]
    for index, stamp in enumerate(stamps):
        if index and parts[index] != parts[index - 1]:
            step = durations[index - 1] or (ticks[-1] - ticks[-2] if index > 1 else 1)
            shift = ticks[-1] + step - stamp
        ticks.append(stamp + shift)
    return ticks


def find_size_change(path: Path, table: FrameTable | None) -> str:
    """Decode all key frames and return an error message if their sizes differ, else ''."""
    container, stream = open_clip(path)
    with container:
        stream.codec_context.skip_frame = "NONKEY"
        sizes = {(frame.width, frame.height) for frame in decode_frames(container, stream)}
    if len(sizes) < 2:
        return ""
    container, stream = open_clip(path)
    with container:  # find the frame's index, counted as the readers count frames
        start = table.stamps[0] if table is not None and table.skipped else None
        frames = dropwhile(
            lambda frame: start is not None and frame.pts != start, decode_frames(container, stream)
        )
        first = None
        for index, frame in enumerate(frames):
            first = first or (frame.width, frame.height)
            if (frame.width, frame.height) != first:
                return size_change(index, (frame.width, frame.height), first)
    return ""


def size_change(index: int, found: tuple[int, int], first: tuple[int, int]) -> str:
    """Return the message for a frame whose (width, height) differs from the first frame's."""
    return (
        f"the picture's size changes: frame {index} is {found[0]}x{found[1]}, frame 0 {first[0]}x{first[1]}; "
        "cut the clip there, or encode it again at one size"
    )
