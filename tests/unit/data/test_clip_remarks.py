"""What the check and the readers remark about a clip.

Alpha, interlaced frames, HDR; and how moving masks are read.
"""

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.content import content_of
from mindspeed_mm.data.images import brightness
from mindspeed_mm.data.probe import probe, probe_mask
from mindspeed_mm.data.traits import content_in_slot, remarks_on
from mindspeed_mm.data.video import open_video
from tests.support.clips import numbered, write_as
from tests.support.errors import names

av = pytest.importorskip("av")
HALF = np.zeros((64, 96), np.uint8)
HALF[:, 48:] = 1
SHIFTS = range(0, 40, 8)


def write_frames(path, codec, pix_fmt, frames, form="rgb24", **context):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        stream.options = context.pop("options", {})
        stream.metadata.update(context.pop("metadata", {}))
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=form)))
        container.mux(stream.encode(None))
    return path


def remarked(path):
    """The one trait of a clip, after the check and both readers were compared."""
    (trait,) = probe(path).traits
    for reader in ("decord", "av"):
        assert open_video(path, reader).traits == (trait,)
    return trait


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_that_is_not_read_is_a_remark(tmp_path, codec):
    path = write_frames(tmp_path / "a.webm", codec, "yuv420p", numbered(4), metadata={"alpha_mode": "1"})
    assert remarked(path) == "no alpha"
    assert names(remarks_on(["no alpha"])[0], "alpha", "VP8", "VP9")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.mp4", "libx264", {"x264-params": "tff=1"}), ("a.ts", "mpeg2video", {"flags": "+ildct+ilme"})],
)
def test_interlaced_frames_are_a_remark(tmp_path, name, codec, options):
    assert remarked(write_as(tmp_path / name, codec, options, 8)) == "interlaced"


@pytest.mark.parametrize("transfer", [16, 18])
@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv420p"])
def test_hdr_colours_are_a_remark(tmp_path, transfer, pix_fmt):
    path = write_frames(tmp_path / "a.mp4", "libx264", pix_fmt, numbered(4), color_trc=transfer)
    assert remarked(path) == "hdr"


def palette_image(values):
    image = Image.fromarray(values, "P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    return image


def alpha_image(values):
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., 3] = values * 255
    return Image.fromarray(pixels)


def write_moving(path, make):
    images = [make(np.roll(HALF, shift, 1)) for shift in SHIFTS]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=62, **options)
    return path


def assert_follows(path, trait):
    """The mask is white where `HALF` is, frame by frame; the check, the reader and the key agree on it."""
    clip, info = open_video(path, mask=True), probe_mask(path)
    read = brightness(clip.read(range(clip.num_frames)))
    assert np.array_equal(read, [np.roll(HALF, shift, 1) * 255 for shift in SHIFTS])
    assert trait in clip.traits
    assert set(clip.traits) == set(info.traits)
    assert info.levels == (0, 255)
    content = content_of(path)
    assert trait in content_in_slot("src_video_mask", content)
    assert trait not in content_in_slot("video", content)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_moving_mask_of_labels_is_white_but_for_index_0(tmp_path, name):
    assert_follows(write_moving(tmp_path / name, palette_image), "labels")


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_moving_mask_of_alpha_alone_is_read_by_alpha(tmp_path, name):
    assert_follows(write_moving(tmp_path / name, alpha_image), "by alpha")


def test_mov_mask_of_alpha_alone_is_read_by_alpha(tmp_path):
    frames = [np.asarray(alpha_image(np.roll(HALF, shift, 1))) for shift in SHIFTS]
    assert_follows(write_frames(tmp_path / "a.mov", "png", "rgba", frames, "rgba"), "by alpha")


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.mov"])
def test_moving_mask_that_is_black_and_opaque_is_black(tmp_path, name):
    frames = [np.array(alpha_image(np.ones_like(HALF))) for _ in range(2)]
    path = tmp_path / name
    if name == "a.mov":
        write_frames(path, "png", "rgba", frames, "rgba")
    else:
        frames[1][0, 0, 0] = 1  # two equal frames would be written as one
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=62, lossless=True)
    assert open_video(path, mask=True).read([0, 1]).max() <= 1
    assert "by alpha" not in probe(path, mask=True).traits


def test_gray_gif_mask_is_read_by_its_brightness(tmp_path):
    path = write_moving(tmp_path / "a.gif", lambda values: Image.fromarray(values * 255))
    clip = open_video(path, mask=True)
    assert np.array_equal(brightness(clip.read([1]))[0], np.roll(HALF, 8, 1) * 255)
    assert "labels" not in clip.traits
    assert content_of(path).endswith("|alpha")  # as every GIF


@pytest.mark.parametrize(("mask", "ground"), [(False, 255), (True, 0)])
def test_transparent_pixels_of_a_gif_show_the_background(tmp_path, mask, ground):
    images = []
    for shift in (0, 8):
        values = np.roll(HALF, shift, 1)
        image = palette_image(values)
        image.putpalette([9, 9, 9, 0, 255, 0] + [0] * 762)
        images.append(image)
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=62, transparency=0, disposal=2)
    read = open_video(path, mask=mask).read([0, 1])
    assert read[0, 0, 0].tolist() == [ground] * 3
    assert read[0, 0, -1].tolist() == [0, 255, 0]
    assert read[1, 0, 50].tolist() == [ground] * 3
