"""Remarks that the check, generation and sheets share.

Square pixels, late starts, animations, ignored files; masks of 0 and 1.
"""

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.check import check_manifest
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.content import content_of
from mindspeed_mm.data.images import image_traits
from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.transforms import load_mask, load_pixels
from mindspeed_mm.data.video import open_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.conditions import load_conditions
from mindspeed_mm.generation.request import Inputs
from mindspeed_mm.generation.sampling_config import SamplingConfig
from tests.support.clips import numbered, write_as, write_clip
from tests.support.errors import raises

av = pytest.importorskip("av")
SAMPLING = SamplingConfig(height=32, width=48, num_frames=9)


def write_late(path, shift):
    with (
        av.open(str(write_clip(path.with_name("plain.mp4"), 24))) as source,
        av.open(str(path), "w") as target,
    ):
        old = source.streams.video[0]
        new = target.add_stream_from_template(old)
        for packet in source.demux(old):
            if packet.size:
                packet.pts += round(shift / float(packet.time_base))
                packet.dts += round(shift / float(packet.time_base))
                packet.stream = new
                target.mux(packet)
    return path


def test_matroska_that_begins_late_is_not_short(tmp_path):
    path = write_late(tmp_path / "a.mkv", 5.0)
    assert probe(path).traits == open_video(path).traits == ()


def test_pixels_that_are_not_square_are_a_remark(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for frame in numbered(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    for reader in ("decord", "av"):
        assert probe(path).traits == open_video(path, reader).traits == ("squeezed",)
    assert "|" not in content_of(path)
    notes = load_conditions(Inputs(src_video=path), SAMPLING).notes
    assert any(remarks_on(["squeezed"])[0] in note for note in notes)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animated_reference_is_a_remark(tmp_path, name):
    images = [Image.fromarray(frame) for frame in numbered(3)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=60)
    assert image_traits(tmp_path / name) == ("pictures",)
    notes = load_conditions(Inputs(src_ref_images=[tmp_path / name]), SAMPLING).notes
    assert [note for note in notes if remarks_on(["pictures"])[0] in note]


def test_pictures_that_a_folder_ignores_are_counted(tmp_path):
    for place, suffix in enumerate((".png", ".png", ".gif", ".tga", ".jp2", ".txt")):
        path = tmp_path / f"{place}{suffix}"
        path.write_bytes(b"")
        if suffix == ".png":
            Image.new("L", (16, 16)).save(path)
    (trait,) = probe(tmp_path).traits
    assert trait == "ignored: 3 (.gif, .jp2, .tga)"
    assert "3 (.gif, .jp2, .tga)" in remarks_on([trait])[0]


def test_raw_motion_jpeg_stream_is_read(tmp_path):
    path = write_as(tmp_path / "a.mjpeg", "mjpeg", {}, 12, pix_fmt="yuvj420p")
    clip = open_video(path)
    assert probe(path).num_frames == clip.num_frames == len(clip.read(range(12))) == 12
    assert probe(path).traits == clip.traits == ("no rate",)
    assert np.array_equal(clip.read([7]), open_video(path).read(range(12))[7:8])


@pytest.mark.parametrize("values", [np.uint8([0, 1]), np.uint16([0, 255])])
def test_soft_mask_of_zero_and_one_is_rejected(tmp_path, values):
    Image.fromarray(np.tile(values, (32, 24))).save(tmp_path / "m.png")
    clip = write_clip(tmp_path / "v.mp4", 9, height=32, width=48)
    size = {"num_frames": 9, "height": 32, "width": 48}
    with raises(DataError, int(values[1])):
        load_mask(tmp_path / "m.png", soft=True, **size)
    with raises(DataError, int(values[1])):
        load_conditions(
            Inputs(src_video=clip, src_mask=tmp_path / "m.png"),
            SAMPLING.model_copy(update={"soft_mask": True}),
        )
    record = SampleRecord(video=clip, src_mask=tmp_path / "m.png", captions=("a",))
    with raises(DataError, int(values[1])):
        load_pixels(record, VideoConfig(num_frames=9, soft_mask=True))
    found = check_manifest([record], VideoConfig(num_frames=9, soft_mask=True), workers=0)
    assert [problem.address.rpartition(".")[2] for problem in found.problems] == ["src_video_mask"]
