"""Readers and writer.

The same frames from both libraries, by number, by time, upright, and errors that name the file.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.video import AvReader, DecordReader, open_video, read_image
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from tests.support.clips import (
    cut_without_decoding,
    number_of,
    numbered,
    numbers_of,
    turn,
    write_as,
    write_clip,
    write_long,
    write_streamable,
    write_variable,
)
from tests.support.errors import raises

pytestmark = pytest.mark.medium

READERS = ["decord", "av"]
SCATTERED = [0, 29, 3, 3, 17, 16, 4, 28]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "片段 ü.mp4"])
def test_both_readers_give_the_same_pixels(tmp_path, name):
    write_clip(tmp_path / name, 30)
    decord, av = (open_video(tmp_path / name, reader) for reader in READERS)
    assert isinstance(decord, DecordReader)
    assert isinstance(av, AvReader)
    one, two = decord.read(SCATTERED), av.read(SCATTERED)
    assert numbers_of(one) == numbers_of(two) == SCATTERED
    assert np.array_equal(one, two)
    assert decord.num_frames == av.num_frames == 30
    assert decord.times == pytest.approx(av.times, abs=1e-3)
    assert decord.fps == pytest.approx(16, abs=0.02)


CLOSED = {"x265-params": "log-level=none:pools=1:open-gop=0"}
COLOURS = {
    "even": ("libx264", {}, {}),
    "full range": ("libx264", {}, {"pix_fmt": "yuvj420p"}),
    "whole chroma": ("libx264", {}, {"pix_fmt": "yuv444p"}),
    "half chroma": ("libx264", {}, {"pix_fmt": "yuv422p"}),
    "deep": ("libx265", CLOSED, {"pix_fmt": "yuv420p10le"}),
    "interlaced": ("libx264", {"x264-params": "tff=1"}, {}),
    "interlaced mpeg2": ("mpeg2video", {"flags": "+ildct+ilme"}, {}),
    "odd": ("mpeg4", {}, {"height": 193, "width": 257}),
}


@pytest.mark.parametrize("degrees", [0, 90])
@pytest.mark.parametrize("colours", COLOURS)
def test_both_readers_give_the_same_bits(tmp_path, colours, degrees):
    """Where decord would spread chroma over the pixels in another way, PyAV reads in its place."""
    codec, options, form = COLOURS[colours]
    path = write_as(tmp_path / "clip.mp4", codec, options, 6, **{"height": 192, "width": 256, **form})
    path = turn(path, tmp_path / "turned.mp4", degrees) if degrees else path
    decord, av = (open_video(path, reader) for reader in READERS)
    assert np.array_equal(decord.read(range(6)), av.read(range(6)))
    assert isinstance(decord, DecordReader) == (colours in ("even", "full range", "whole chroma"))


@pytest.mark.parametrize("reader", READERS)
def test_frames_of_a_variable_rate_have_their_own_times(tmp_path, reader):
    moments = np.cumsum([0, 40, 40, 100, 40, 60, 20, 200, 40, 40]).tolist()
    clip = open_video(write_variable(tmp_path / "phone.mp4", moments), reader)
    assert clip.times == pytest.approx([moment / 1000 for moment in moments], abs=2e-3)
    assert numbers_of(clip.read([7, 2])) == [7, 2]
    assert probe(clip.path).variable
    assert not probe(write_clip(tmp_path / "even.mp4", 9)).variable


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("degrees", "corner"), [(90, (0, 0)), (180, (0, 1)), (270, (1, 1))])
def test_rotated_phone_video_is_read_upright(tmp_path, reader, degrees, corner):
    path = turn(write_clip(tmp_path / "flat.mp4", 6, height=192, width=256), tmp_path / "phone.mp4", degrees)
    clip = open_video(path, reader)
    wanted = (192, 256) if degrees == 180 else (256, 192)
    frame = clip.read([3])[0]
    assert (clip.height, clip.width) == frame.shape[:2] == wanted
    assert (probe(path).height, probe(path).width) == wanted
    y, x = (6 if place == 0 else -6 for place in corner)  # the red corner was at the lower left
    assert frame[y, x, 0] > 180
    assert frame[y, x, 1] < 80


def test_width_that_decord_cannot_read_is_still_read(tmp_path):
    clip = open_video(write_clip(tmp_path / "small.mp4", 5, height=64, width=96), "decord")
    assert numbers_of(clip.read([4, 0])) == [4, 0]


FORMATS = {
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8"}),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    "hevc.mp4": (
        "libx265",
        {"x265-params": "log-level=none:keyint=8:min-keyint=8:pools=1"},
    ),  # x265 opens its groups by itself
    "stream.ts": ("libx264", {"x264-params": "keyint=8"}),
    "old.avi": ("libx264", {"x264-params": "keyint=8:bframes=3"}),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FORMATS)
def test_jumps_land_on_the_right_frame_in_every_format(tmp_path, reader, name):
    codec, options = FORMATS[name]
    clip = open_video(write_as(tmp_path / name, codec, options), reader)
    for wanted in ([0, 39, 12, 13, 11, 8, 7, 9], [1, 9, 17, 18], list(range(0, 40, 3))):
        assert numbers_of(clip.read(wanted)) == wanted
    assert clip.num_frames == 40
    assert clip.fps == pytest.approx(24, abs=0.1)


@pytest.mark.parametrize("reader", READERS)
def test_frames_that_an_edit_list_cuts_off_do_not_count(tmp_path, reader):
    path = cut_without_decoding(tmp_path / "whole.mp4", tmp_path / "cut.mp4", first=11)
    clip = open_video(path, reader)
    assert numbers_of(clip.read([0, 1, 9, 3])) == [11, 12, 20, 14]
    assert clip.num_frames == 40 - 11


def test_image_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (1, 2, 10, 11):
        Image.fromarray(numbered(1, first=number)[0]).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    clip = open_video(tmp_path)
    assert numbers_of(clip.read(range(clip.num_frames))) == [1, 2, 10, 11]
    assert not clip.timed


def test_images_of_unequal_size_in_a_folder_are_named(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 48)).save(tmp_path / "1.png")
    with raises(DataError, "1.png", "32x48", "32x32"):
        open_video(tmp_path).read([0, 1])


def test_transparent_pixels_take_the_background(tmp_path):
    picture = np.zeros((20, 20, 4), np.uint8)
    picture[:10] = (0, 0, 255, 255)
    Image.fromarray(picture).save(tmp_path / "logo.png")
    assert read_image(tmp_path / "logo.png", 255)[[0, -1], 0].tolist() == [[0, 0, 255], [255, 255, 255]]
    assert read_image(tmp_path / "logo.png", 0)[-1, 0].tolist() == [0, 0, 0]


def test_sixteen_bit_images_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((16, 16), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, 0].tolist() == [128, 128, 128]


def test_photo_that_was_taken_sideways_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(numbered(1)[0]).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").shape == (128, 96, 3)


@pytest.mark.parametrize("fps", [16, 24, 30000 / 1001, 12.5])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_written_clip_plays_at_exactly_its_rate(tmp_path, fps, suffix):
    import av

    write_video(tmp_path / f"clip{suffix}", numbered(12), fps)
    with av.open(str(tmp_path / f"clip{suffix}")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-9)


@pytest.mark.parametrize("name", ["mask.mkv", "mask.mp4"])
@pytest.mark.parametrize("size", [(32, 64), (33, 65)])
@pytest.mark.parametrize("reader", READERS)
def test_lossless_gives_back_every_bit_of_a_mask(tmp_path, name, size, reader):
    frames = np.repeat(np.random.default_rng(0).choice([0, 255], (5, *size, 1)).astype(np.uint8), 3, axis=-1)
    clip = open_video(write_video(tmp_path / name, frames, 16, lossless=True), reader)
    assert np.array_equal(clip.read(range(5)), frames)


def test_chroma_sample_is_the_mean_of_its_four_pixels(tmp_path):
    """By BT.601's formula, on colours that change from pixel to pixel.

    The rest of H.264 is lossless at quality 0.
    """
    wanted = np.random.default_rng(0).integers(60, 196, (32, 32, 3)).astype(np.uint8)
    written = open_video(write_video(tmp_path / "clip.mp4", wanted[None], 16, quality=0), "av").read([0])[0]

    def chroma(picture):
        blocks = picture.reshape(16, 2, 16, 2, 3).mean((1, 3))
        return blocks @ np.array([[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).T

    assert np.abs(chroma(written) - chroma(wanted)).mean() < 1.0


@pytest.mark.parametrize(
    "size", [64, 720]
)  # players take unmarked colours for BT.601 if small, for BT.709 if large
def test_written_clip_tells_how_its_colours_were_converted(tmp_path, size):
    import av

    frames = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    path = write_video(tmp_path / "clip.mp4", frames, 16)
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        told = codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range
    assert told == (6, 1, 1, 1)  # BT.601's matrix, BT.709, BT.709 by ITU-T H.273; limited range by FFmpeg
    assert np.array_equal(*(open_video(path, reader).read([0, 1]) for reader in READERS))


def test_odd_sizes_are_made_even_and_quality_costs_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 33, 65, 3), dtype=np.uint8)
    fine = write_video(tmp_path / "fine.mp4", frames, 16, quality=5)
    coarse = write_video(tmp_path / "coarse.mp4", frames, 16, quality=45)
    assert open_video(fine).read([0]).shape == (1, 34, 66, 3)
    assert fine.stat().st_size > 2 * coarse.stat().st_size


def test_clip_whose_frames_break_off_leaves_no_file(tmp_path):
    def frames():
        yield numbered(1)[0]
        raise RuntimeError("out of frames")

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "clip.mp4", frames(), 16)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["text", "empty", "missing", "truncated"])
def test_file_without_video_is_an_error_with_its_path(tmp_path, reader, kind):
    path = tmp_path / "bad.mp4"
    if kind == "text":
        path.write_text("I am a text\n" * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        whole = write_clip(tmp_path / "whole.mp4", 20).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with raises(DataError, "bad.mp4"):
        open_video(path, reader)


@pytest.mark.parametrize("reader", READERS)
def test_frames_behind_the_damage_are_an_error_and_not_made_up(tmp_path, reader):
    whole = write_streamable(tmp_path / "whole.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    clip = open_video(cut, reader)
    assert clip.read([0]).shape == (1, 96, 128, 3)
    with raises(DataError, "cut.mp4"):
        clip.read(range(clip.num_frames))


def test_copy_that_broke_off_is_known_from_its_index_alone(tmp_path):
    whole = write_streamable(tmp_path / "whole.mp4").read_bytes()
    assert probe(tmp_path / "whole.mp4").num_frames == 40
    (tmp_path / "cut.mp4").write_bytes(whole[:-2000])
    with raises(DataError, "cut off"):
        probe(tmp_path / "cut.mp4")


def test_probe_agrees_with_the_readers(tmp_path):
    for name, fps in (("a.mp4", 24), ("b.mkv", 16)):
        clip, info = open_video(write_clip(tmp_path / name, 30, fps)), probe(tmp_path / name)
        assert (info.num_frames, info.height, info.width) == (clip.num_frames, clip.height, clip.width)
        assert info.duration == pytest.approx(clip.duration, abs=2e-3)
        assert info.fps == pytest.approx(fps, abs=0.01)


_FEW_OF_MANY = """
import resource, sys
from mindspeed_mm.data.transforms import load_clip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clip = load_clip(sys.argv[1], num_frames=17, height=480, width=832, long_clip="resample", reader=sys.argv[2])
print(list(clip.shape), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_ten_minutes_of_full_hd_need_little_memory(tmp_path, reader):
    path = write_long(tmp_path / "long.mp4", 600 * 16)
    clip = open_video(path, reader)
    assert (clip.num_frames, clip.height, clip.width) == (9600, 1080, 1920)
    assert number_of(clip.read([9599])[0]) == 9599 % 16
    done = subprocess.run(
        [sys.executable, "-c", _FEW_OF_MANY, str(path), reader], capture_output=True, text=True, check=True
    )
    shape, megabytes = done.stdout.rsplit(maxsplit=1)
    assert shape == "[3, 17, 480, 832]"
    assert int(megabytes) < 500, (
        "17 decoded frames are 106 MB, the clip itself 78 MB; all 9600 would be 60 GB"
    )
