"""Clips whose size changes, whose end is cut off, or whose stamps and streams mislead.

The check and both readers agree.
"""

import numpy as np
import pytest

from mindspeed_mm.data import probe as probing
from mindspeed_mm.data.bitstream import SizeWatch, packet_head
from mindspeed_mm.data.clips import open_clip
from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.video import DecordReader, open_video
from mindspeed_mm.errors import DataError
from tests.support.clips import numbers_of, write_as
from tests.support.errors import raises

pytestmark = pytest.mark.medium

av = pytest.importorskip("av")
READERS = ["decord", "av"]
X264 = {"x264-params": "keyint=8:bframes=2"}


def join(target, parts):
    """Packets of some clips one after the other, as `ffmpeg -f concat -c copy` writes them.

    `parts`: path, frames.
    """
    with av.open(str(target), "w") as container:
        new, played = None, 0
        for path, frames in parts:
            with av.open(str(path)) as source:
                old = source.streams.video[0]
                new = new or container.add_stream_from_template(old)
                start = None
                for packet in source.demux(old):
                    if packet.size:
                        start = packet.pts if start is None else start
                        shift = round(played / 24 / float(packet.time_base)) - start
                        copy = av.Packet(
                            bytes(packet)
                        )  # without side data: the new parameters come in the stream
                        copy.pts, copy.dts, copy.time_base = (
                            packet.pts + shift,
                            packet.dts + shift,
                            packet.time_base,
                        )
                        copy.is_keyframe, copy.duration, copy.stream = (
                            packet.is_keyframe,
                            packet.duration,
                            new,
                        )
                        container.mux(copy)
            played += frames
    return target


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Transport streams of 8 frames: 256x192 and 192x256."""
    folder = tmp_path_factory.mktemp("pieces")
    return [
        write_as(folder / f"{w}.ts", "libx264", X264, 8, height=h, width=w)
        for w, h in ((256, 192), (192, 256))
    ]


def looks(path):
    return {
        "check": lambda: probe(path),
        **{name: lambda name=name: read_all(open_video(path, name)) for name in READERS},
    }


def read_all(clip):
    return clip.read(range(clip.num_frames))


@pytest.mark.parametrize("look", ["check", *READERS])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_size_that_changes_and_returns_is_rejected(tmp_path, pieces, name, look):
    wide, tall = pieces
    path = join(tmp_path / name, [(tall if i == 2 else wide, 8) for i in range(15)])
    with raises(DataError, 16, "192x256", 0, "256x192"):
        looks(path)[look]()


@pytest.mark.parametrize("look", ["check", *READERS])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_two_sizes_in_one_clip_are_rejected(tmp_path, pieces, name, look):
    path = join(tmp_path / name, [(piece, 8) for piece in pieces])
    with raises(DataError, 8, "192x256", 0, "256x192"):
        looks(path)[look]()


@pytest.mark.parametrize("look", ["check", *READERS])
@pytest.mark.parametrize(("codec", "name"), [("libx265", "a.mkv"), ("libx265", "a.mp4"), ("mpeg4", "a.mp4")])
def test_two_sizes_of_other_codecs_are_rejected(tmp_path, codec, name, look):
    options = (
        {"x265-params": "keyint=4:bframes=0:repeat-headers=1:log-level=0"}
        if codec == "libx265"
        else {"g": "4"}
    )
    parts = [
        write_as(tmp_path / f"{w}.ts", codec, options, 8, height=h, width=w)
        for w, h in ((256, 192), (192, 256))
    ]
    path = join(tmp_path / name, [(part, 8) for part in parts])
    with raises(DataError, 8, "192x256", 0, "256x192"):
        looks(path)[look]()


def test_raw_streams_of_two_sizes_are_rejected(tmp_path):
    parts = [
        write_as(tmp_path / f"{w}.h264", "libx264", X264, 8, height=h, width=w)
        for w, h in ((256, 192), (192, 256))
    ]
    (tmp_path / "a.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    with raises(DataError, 8, "192x256"):
        probe(tmp_path / "a.h264")


def test_parts_of_one_size_are_not_change(tmp_path, pieces):
    path = join(tmp_path / "a.mp4", [(pieces[0], 8)] * 3)
    assert probe(path).num_frames == read_all(open_video(path)).shape[0] == 24


CODECS = [
    ("libx264", "ts", "yuv420p"),
    ("libx265", "ts", "yuv420p"),
    ("libvpx", "webm", "yuv420p"),
    ("libvpx-vp9", "webm", "yuv420p"),
    ("libsvtav1", "mp4", "yuv420p"),
    ("mpeg2video", "ts", "yuv420p"),
    ("mpeg4", "avi", "yuv420p"),
    ("mjpeg", "avi", "yuvj420p"),
    ("prores_ks", "mov", "yuv422p10le"),
    ("png", "mov", "rgb24"),
]


@pytest.mark.parametrize(("codec", "suffix", "pix_fmt"), CODECS)
def test_key_frames_name_their_size_without_decoding(tmp_path, codec, suffix, pix_fmt):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {"g": "2", **({"x265-params": "log-level=0"} if codec == "libx265" else {})}
    heads = []
    for height in (64, 96):
        path = write_as(tmp_path / f"{height}.{suffix}", codec, options, 4, pix_fmt=pix_fmt, height=height)
        container, stream = open_clip(path)
        with container:
            watch = SizeWatch(stream.codec_context)
            heads.append(
                [
                    packet_head(packet)
                    for packet in container.demux(stream)
                    if packet.is_keyframe and packet.size
                ]
            )
            for head in heads[-1]:
                watch.add(head)
            assert not watch.unsure
    watch.add(heads[0][0])
    assert watch.unsure


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_ordinary_clip_decodes_no_extra_keys(tmp_path, monkeypatch, name):
    path = write_as(tmp_path / name, "libx264", X264, 40)
    monkeypatch.setattr(probing, "find_size_change", lambda *_: pytest.fail("decodes every key frame"))
    assert probe(path).num_frames == 40
    assert isinstance(open_video(path, "decord"), DecordReader)


def write_noise(path, codec="libx264", options=None):
    """40 frames of noise, so that a cut lands in the middle of a frame."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt, stream.options = 96, 128, "yuv420p", {"g": "8"}
        for _ in range(40):
            picture = noise.integers(0, 255, (96, 128, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.ts", "libx264"),
        ("a.flv", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
    ],
)
def test_file_that_is_cut_off_is_read_up_to_there(tmp_path, name, codec, reader):
    whole = write_noise(tmp_path / name, codec, FRAGMENTED if name == "a.mp4" else None)
    frames = open_video(whole).read(range(40))
    cut = tmp_path / f"cut{whole.suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 4 // 10])
    info, clip = probe(cut), open_video(cut, reader)
    assert 7 <= info.num_frames == clip.num_frames < 20
    assert "short" in clip.traits
    assert set(clip.traits) == set(info.traits)
    read = read_all(clip)
    assert np.array_equal(read[:7], frames[:7])
    assert all(any(np.array_equal(a, b) for b in frames) for a in read)


def test_transport_stream_that_is_whole_keeps_its_end(tmp_path):
    for count in range(10, 16):
        clip = open_video(write_as(tmp_path / f"{count}.ts", "libx264", X264, count))
        assert clip.num_frames == count
        assert clip.traits == ()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_picture_behind_the_first_key_loses_no_frames(tmp_path, name, reader):
    """Matroska goes back to the cover's packet, not to the first key frame."""
    clip = write_as(tmp_path / "clip.mp4", "libx264", X264, 24)
    path = tmp_path / name
    with av.open(str(clip)) as source, av.open(str(path), "w") as container:
        old = source.streams.video[0]
        cover = container.add_stream("mjpeg", rate=24)
        cover.height, cover.width, cover.pix_fmt = 96, 128, "yuvj420p"
        new = container.add_stream_from_template(old)
        still = av.VideoFrame.from_ndarray(np.full((96, 128, 3), (250, 0, 0), np.uint8), format="rgb24")
        covers = [*cover.encode(still), *cover.encode(None)]
        for packet in covers:
            packet.pts = packet.dts = 1  # of 24 a second
            container.mux(packet)
        for packet in source.demux(old):
            if packet.size:
                packet.stream = new
                container.mux(packet)
    info, opened = probe(path), open_video(path, reader)
    assert info.num_frames == opened.num_frames == 24
    assert info.traits == opened.traits == ("later stream",)
    assert numbers_of(read_all(opened)) == list(range(24))


@pytest.mark.parametrize("reader", READERS)
def test_two_frames_with_one_stamp_are_both_read(tmp_path, reader):
    clip = write_as(tmp_path / "clip.mp4", "libx264", {"x264-params": "keyint=8:bframes=0"}, 16)
    path = tmp_path / "a.mkv"
    with av.open(str(clip)) as source, av.open(str(path), "w") as container:
        old = source.streams.video[0]
        new = container.add_stream_from_template(old)
        for place, packet in enumerate(p for p in source.demux(old) if p.size):
            if place == 5:
                packet.pts = packet.dts = round(4 / 24 / float(packet.time_base))
            packet.stream = new
            container.mux(packet)
    info, opened = probe(path), open_video(path, reader)
    assert info.num_frames == opened.num_frames == 16
    assert info.traits == opened.traits == ("repeats",)
    assert numbers_of(read_all(opened)) == list(range(16))
    assert numbers_of(opened.read([9, 5, 4])) == [9, 5, 4]


@pytest.mark.parametrize("reader", READERS)
def test_matroska_shorter_than_its_header_says_so(tmp_path, reader):
    whole = write_noise(tmp_path / "a.mkv")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert open_video(cut, reader).traits == probe(cut).traits == ("short",)
    assert open_video(whole, reader).traits == probe(whole).traits == ()
