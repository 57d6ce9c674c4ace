"""Small clips for tests.

Every frame carries its number in its pixels, so that a test can ask which frame it got.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

from mindspeed_mm.data.video_writer import write_video

BITS = 8


def numbered(count: int, height: int = 96, width: int = 128, first: int = 0) -> np.ndarray:
    """uint8 [T, H, W, 3].

    The number in eight black or white bars along the top, a gray ramp below, red in the lower left corner.
    """
    frames = np.empty((count, height, width, 3), np.uint8)
    ramp = np.linspace(40, 200, width).astype(np.uint8)
    for i in range(count):
        frames[i] = ramp[None, :, None]
        for bit in range(BITS):
            left, right = bit * width // BITS, (bit + 1) * width // BITS
            frames[i, : height // 2, left:right] = 255 if (first + i) >> bit & 1 else 0
        frames[i, -height // 4 :, : width // 4] = (220, 20, 20)
    return frames


def number_of(frame: np.ndarray) -> int:
    """The number that `numbered` wrote into a frame, at any size."""
    height, width = frame.shape[:2]
    row = frame[height // 4, :, 0]
    return sum(1 << bit for bit in range(BITS) if row[(2 * bit + 1) * width // (2 * BITS)] > 127)


def numbers_of(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def write_clip(path: Path, count: int, fps: float = 16, height: int = 96, width: int = 128) -> Path:
    return write_video(path, numbered(count, height, width), fps, quality=10)


def write_variable(path: Path, milliseconds: list[int]) -> Path:
    """A clip whose frame i comes on at milliseconds[i]."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, moment in zip(numbered(len(milliseconds)), milliseconds, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def turn(source: Path, target: Path, degrees: int) -> Path:
    """Copy an mp4 and write a clockwise rotation into its track header, as phones do."""
    one, minus = 1 << 16, -(1 << 16) & 0xFFFFFFFF
    a, b, c, d = {90: (0, one, minus, 0), 180: (minus, 0, 0, minus), 270: (0, minus, one, 0)}[degrees]
    data = bytearray(source.read_bytes())
    box = data.index(b"tkhd") + 4
    matrix = box + 4 + (32 if data[box] == 1 else 20) + 16
    struct.pack_into(">9I", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def write_as(
    path: Path,
    codec: str,
    options: dict[str, str],
    count: int = 40,
    *,
    pix_fmt: str = "yuv420p",
    height: int = 96,
    width: int = 128,
) -> Path:
    """A clip of 24 frames a second in another codec or container."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, pix_fmt, options
        for frame in numbered(count, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def cut_without_decoding(whole: Path, target: Path, first: int) -> Path:
    """What `ffmpeg -ss … -c copy` writes.

    Packets from the key frame before `first`, and an edit list that hides what is too early.
    """
    import av

    write_as(whole, "libx264", {"x264-params": "keyint=8"})
    with av.open(str(whole)) as source, av.open(str(target), "w") as container:
        old = source.streams.video[0]
        new = container.add_stream_from_template(old)
        shift = round(first / 24 / float(old.time_base))
        for packet in source.demux(old):
            if packet.size and packet.pts * old.time_base * 24 >= first // 8 * 8:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, new
                container.mux(packet)
    return target


def write_streamable(path: Path, count: int = 40) -> Path:
    """An mp4 of noise whose index stands in front, so that a cut-off copy still opens."""
    import av

    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for _ in range(count):
            picture = noise.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_long(path: Path, frames: int, fps: int = 16, height: int = 1080, width: int = 1920) -> Path:
    """A long clip that is quick to make: one group of pictures, its packets written again and again."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "ultrafast", "bf": "0", "g": "16"}
        shown = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in numbered(16, height, width))
        packets = [packet for picture in shown for packet in stream.encode(picture)] + list(
            stream.encode(None)
        )
        kept = [(bytes(packet), packet.is_keyframe, packet.time_base) for packet in packets]
        for place in range(frames):
            data, is_key, base = kept[place % 16]
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, base, is_key
            packet.pts = packet.dts = round(place / fps / float(base))
            packet.duration = round(1 / fps / float(base))
            container.mux(packet)
    return path
