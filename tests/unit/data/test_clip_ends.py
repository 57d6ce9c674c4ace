"""Clips cut off inside a frame, and raw streams without a clock: the check reads what the reader reads."""

import numpy as np
import pytest

from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.video import open_video

pytestmark = pytest.mark.medium

av = pytest.importorskip("av")


def write_noise(path, codec, rate=16, count=24, **options):
    noise = np.random.default_rng(0)
    if codec == "libx264":  # its mbtree writes another file each time on CPUs with AVX-512
        options = {"mbtree": "0", **options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.options = 64, 96, "yuv420p", {"g": "8", **options}
        for _ in range(count):
            picture = noise.integers(0, 255, (64, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.avi", "mpeg4"),
        ("a.wmv", "wmv2"),
        ("a.h264", "libx264"),
        ("a.hevc", "libx265"),
        ("a.m2v", "mpeg2video"),
        ("a.ts", "libx265"),
    ],
)
def test_cut_file_ends_before_the_damaged_frame(tmp_path, name, codec):
    whole = write_noise(tmp_path / name, codec)
    cut = tmp_path / f"cut{whole.suffix}"
    assert "short" not in probe(whole).traits
    for part in (0.55, 0.63, 0.81):
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
        info, clip = probe(cut), open_video(cut)
        assert info.num_frames == clip.num_frames < 24
        assert len(clip.read(range(clip.num_frames))) == clip.num_frames
        assert "short" in clip.traits
        assert info.traits == clip.traits


def test_clip_without_its_beginning_has_a_whole_end(tmp_path):
    whole = write_noise(tmp_path / "a.ts", "libx264", rate=4)  # a group of 2 seconds
    late = tmp_path / "late.ts"
    late.write_bytes(whole.read_bytes()[12 * 188 :])
    info, clip = probe(late), open_video(late)
    assert 0 < info.num_frames == clip.num_frames < 24
    whole_tail = open_video(whole).read(range(24 - clip.num_frames, 24))
    assert np.array_equal(clip.read(range(clip.num_frames)), whole_tail)
    assert info.traits == clip.traits == ("lead",)


@pytest.mark.parametrize("name", ["a.hevc", "a.ts"])
def test_torn_hevc_frame_is_left_out(tmp_path, name):
    # open groups: the last frame of the file may lean on the group before
    whole = write_noise(tmp_path / name, "libx265", **{"x265-params": "bframes=3:open-gop=1:log-level=none"})
    pictures = {frame.tobytes() for frame in open_video(whole).read(range(24))}
    cut = tmp_path / f"cut{whole.suffix}"
    for part in (0.42, 0.51, 0.57, 0.7, 0.86):
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
        clip = open_video(cut)
        assert {frame.tobytes() for frame in clip.read(range(clip.num_frames))} <= pictures
        assert name == "a.ts" or "short" in clip.traits  # a transport stream may be cut between two frames
        assert (probe(cut).num_frames, probe(cut).traits) == (clip.num_frames, clip.traits)


@pytest.mark.parametrize(("name", "codec"), [("a.h264", "libx264"), ("a.hevc", "libx265")])
def test_raw_stream_plays_at_its_own_rate(tmp_path, name, codec):
    path = write_noise(tmp_path / name, codec)
    info, clip = probe(path), open_video(path)
    assert info.fps == clip.fps == 16
    assert info.duration == clip.duration == pytest.approx(24 / 16)
    assert not info.variable
    assert info.traits == clip.traits == ("untimed",)


def test_raw_stream_without_a_rate_says_so(tmp_path):
    path = write_noise(tmp_path / "a.obu", "libsvtav1")
    assert open_video(path).traits == probe(path).traits == ("no rate",)


def test_raw_mpeg2_stream_has_no_variable_rate(tmp_path):
    info = probe(write_noise(tmp_path / "a.m2v", "mpeg2video", rate=24))
    assert info.fps == 24
    assert not info.variable
