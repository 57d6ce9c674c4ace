"""What a clip is.

One stream, its frames and times, its orientation, alpha, one size; the check and both readers agree.
"""

import json
import re
import shutil
import struct
import subprocess
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.check import check_dataset, check_manifest
from mindspeed_mm.data.clips import check_av_version
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.content import content_of
from mindspeed_mm.data.manifest import scan_manifest
from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.traits import content_in_slot
from mindspeed_mm.data.video import AvReader, open_video
from mindspeed_mm.errors import ConfigError, DataError
from tests.support.clips import numbered, numbers_of, turn, write_as, write_clip
from tests.support.errors import raises

pytestmark = pytest.mark.medium

av = pytest.importorskip("av")
READERS = ["decord", "av"]


def mirror(source, target, matrix):
    """Copy an mp4 with another display matrix (a, b, c, d) in its track header."""
    turn(source, target, 180)
    data = bytearray(target.read_bytes())
    box = data.index(b"tkhd") + 4
    start = box + 4 + (32 if data[box] == 1 else 20) + 16
    a, b, c, d = ((value << 16) & 0xFFFFFFFF for value in matrix)
    struct.pack_into(">9I", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def with_cover(path, count=12):
    """A still mjpeg as stream 0 that nothing marks as a cover, and a clip."""
    with av.open(str(path), "w") as container:
        cover, clip = container.add_stream("mjpeg", rate=16), container.add_stream("libx264", rate=16)
        for stream, form in ((cover, "yuvj420p"), (clip, "yuv420p")):
            stream.height, stream.width, stream.pix_fmt = 96, 128, form
        red = np.full((96, 128, 3), (250, 0, 0), np.uint8)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
        container.mux(cover.encode(None))
        for frame in numbered(count):
            container.mux(clip.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(clip.encode(None))
    return path


def same_everywhere(path, reader="av"):
    """The clip, after the check's view of it was compared."""
    clip, info = open_video(path, reader), probe(path)
    assert (info.num_frames, info.height, info.width) == (clip.num_frames, clip.height, clip.width)
    return clip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["drone.mp4", "drone.mkv"])
def test_still_picture_in_front_is_not_the_clip(tmp_path, reader, name):
    path = with_cover(tmp_path / name)
    clip = same_everywhere(path, reader)
    assert numbers_of(clip.read(range(12))) == list(range(12))
    assert "later stream" in probe(path).traits


@pytest.mark.parametrize("reader", READERS)
def test_joined_transport_streams_play_in_sequence(tmp_path, reader):
    one = write_as(tmp_path / "a.ts", "libx264", {"x264-params": "keyint=8"}, 10).read_bytes()
    (tmp_path / "joined.ts").write_bytes(one + one)
    clip = same_everywhere(tmp_path / "joined.ts", reader)
    assert numbers_of(clip.read(range(20))) == [*range(10), *range(10)]
    assert numbers_of(clip.read([13, 2, 19])) == [3, 2, 9]
    assert clip.times == sorted(clip.times)
    assert clip.times[-1] == pytest.approx(19 / 24, abs=0.01)


@pytest.mark.parametrize("reader", READERS)
def test_stream_that_begins_inside_a_group_starts_at_a_key(tmp_path, reader):
    whole = write_as(tmp_path / "a.ts", "libx264", {"x264-params": "keyint=8:bframes=0"}, 30).read_bytes()
    place = next(p for p in range(12 * 188, len(whole), 188))
    (tmp_path / "cut.ts").write_bytes(whole[place:])
    clip = same_everywhere(tmp_path / "cut.ts", reader)
    first, *rest = numbers_of(clip.read(range(clip.num_frames)))
    assert first % 8 == 0
    assert rest == list(range(first + 1, 30))


@pytest.mark.parametrize("count", [12, 16])
def test_change_of_size_is_rejected_with_frame_and_sizes(tmp_path, count):
    one = write_as(tmp_path / "a.ts", "libx264", {}, count, height=64, width=96).read_bytes()
    two = write_as(tmp_path / "b.ts", "libx264", {}, count, height=96, width=64).read_bytes()
    path = tmp_path / "two.ts"
    path.write_bytes(one + two)
    with raises(DataError, count, "64x96", 0, "96x64"):
        open_video(path).read(range(2 * count))
    with raises(DataError, count, "64x96", 0, "96x64"):
        probe(path)


@pytest.mark.parametrize("reader", READERS)
def test_change_of_size_in_an_mp4_is_rejected(tmp_path, reader):
    """As `ffmpeg -f concat -c copy` writes it: the new parameters come as side data."""
    big = write_as(tmp_path / "a.ts", "libx264", {"x264-params": "keyint=8"}, 20, height=64, width=96)
    small = write_as(tmp_path / "b.ts", "libx264", {"x264-params": "keyint=8"}, 20, height=96, width=64)
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        stream, place = None, 0
        for part in (big, small):
            with av.open(str(part)) as source:
                old = source.streams.video[0]
                stream = stream or container.add_stream_from_template(old)
                start = None
                for packet in source.demux(old):
                    if packet.size:
                        start = packet.dts if start is None else start
                        shift = place * 90000 // 24 - start
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        container.mux(packet)
                place += 20
    for look in (probe, lambda path: open_video(path, reader).read(range(40))):
        with raises(DataError, 20, "64x96", 0, "96x64"):
            look(path)


MATRICES = {
    "hflip": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "vflip": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transpose": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "transverse": ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", MATRICES)
def test_mirrored_display_matrices_are_followed(tmp_path, reader, kind):
    matrix, wanted = MATRICES[kind]
    stored = write_clip(tmp_path / "stored.mp4", 3, height=192, width=256)
    path = mirror(stored, tmp_path / "front.mp4", matrix)
    plain = open_video(stored).read([1])[0]
    assert np.array_equal(same_everywhere(path, reader).read([1])[0], wanted(plain))


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg command is the oracle")
@pytest.mark.parametrize("kind", MATRICES)
def test_mirrored_clips_equal_what_ffmpeg_shows(tmp_path, kind):
    path = mirror(
        write_clip(tmp_path / "a.mp4", 2, height=192, width=256), tmp_path / "b.mp4", MATRICES[kind][0]
    )
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    frames = open_video(path).read([0, 1])
    shown = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert np.array_equal(np.frombuffer(shown, np.uint8).reshape(frames.shape), frames)


def test_transparent_pixels_of_a_clip_show_the_background(tmp_path):
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:, :32] = (0, 0, 255, 255)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=16)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode(None))
    white, black = (open_video(tmp_path / "a.mov", mask=mask).read([0])[0] for mask in (False, True))
    assert white[0, [0, -1]].tolist() == [[0, 0, 255], [255, 255, 255]]
    assert black[0, -1].tolist() == [0, 0, 0]


def test_raw_h264_is_read_by_place_and_remarked(tmp_path):
    clip = same_everywhere(write_as(tmp_path / "a.h264", "libx264", {}, 10))
    assert numbers_of(clip.read([9, 0, 4])) == [9, 0, 4]
    assert "untimed" in clip.traits


def test_image_with_a_video_name_is_named(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    path = (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    for look in (probe, open_video):
        with raises(DataError, "a.mp4", "PNG"):
            look(path)


def test_only_clips_that_are_read_otherwise_have_other_keys(tmp_path):
    plain = write_clip(tmp_path / "plain.mp4", 3)
    assert "|" not in content_of(plain)
    assert "|" not in content_of(turn(plain, tmp_path / "turned.mp4", 90))
    assert content_of(mirror(plain, tmp_path / "m.mp4", (-1, 0, 0, 1))).endswith("|mirrored")
    assert content_in_slot("video", "abc|alpha,labels") == "abc|alpha"
    assert content_in_slot("src_video_mask", "abc|alpha,labels") == "abc|alpha,labels"


def test_old_av_is_one_line_with_the_command(monkeypatch):
    check_av_version()
    monkeypatch.setattr(metadata, "version", lambda name: "14.0.1")
    with raises(ConfigError, "14.0.1", "av>=17"):
        check_av_version()


def rows(folder, masks):
    write_clip(folder / "a.mp4", 9, height=48, width=64)
    path = folder / "data.json"
    path.write_text(json.dumps([{"video": "a.mp4", "cap": "x", "src_video_mask": mask} for mask in masks]))
    return path


def test_masks_of_zero_and_one_are_rejected_by_the_check(tmp_path):
    Image.fromarray(np.eye(48, 64, dtype=np.uint8)).save(tmp_path / "m.png")
    with raises(DataError, 1, 255):
        check_dataset(rows(tmp_path, ["m.png"]), VideoConfig(num_frames=9), workers=0)


def test_16_bit_masks_of_8_bit_values_fail_the_check(tmp_path):
    Image.fromarray(np.eye(48, 64, dtype=np.uint16) * 255).save(tmp_path / "m.png")
    with raises(DataError, 255, 65535):
        check_dataset(rows(tmp_path, ["m.png"]), VideoConfig(num_frames=9), workers=0)


def test_opaque_black_mask_is_a_remark_of_the_check(tmp_path):
    Image.new("RGBA", (64, 48), (0, 0, 0, 255)).save(tmp_path / "m.png")
    report = check_manifest(scan_manifest(rows(tmp_path, ["m.png"])), VideoConfig(), workers=0)
    assert re.search(r"\b1 clip with .*\bwhite nowhere\b", report.summary())


def test_mask_without_white_is_a_remark_with_a_count(tmp_path):
    for name, value in (("gray.png", 127), ("white.png", 255)):
        Image.new("L", (64, 48), value).save(tmp_path / name)
    write_as(tmp_path / "red.mp4", "libx264", {}, 9)
    report = check_manifest(
        scan_manifest(rows(tmp_path, ["gray.png", "gray.png", "white.png"])), VideoConfig(), workers=0
    )
    assert re.search(r"\b2 clips with .*\bwhite nowhere\b", report.summary())
    assert not report.notes
    report = check_manifest(scan_manifest(rows(tmp_path, ["white.png"])), VideoConfig(), workers=0)
    assert "white everywhere" in report.notes[0]


def test_ordinary_clips_have_no_remarks(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        assert AvReader(write_clip(tmp_path / name, 5)).traits == probe(tmp_path / name).traits == ()
