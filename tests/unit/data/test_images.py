"""Images are read by their mode, within a pixel limit; masks by one rule."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.data.images import open_image, read_image, read_mask
from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.resize import binarize
from mindspeed_mm.data.video import open_video
from mindspeed_mm.errors import ConfigError, DataError
from tests.support.errors import raises
from tests.support.pngs import png_bytes


def test_sixteen_bit_depth_does_not_depend_on_the_frame(tmp_path):
    for place, value in enumerate((0, 100, 200, 300, 2000, 20000)):
        Image.fromarray(np.full((16, 16), value, np.uint16)).save(tmp_path / f"{place}.png")
    assert open_video(tmp_path).read(range(6))[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 8, 78]


def test_float_images_run_from_zero_to_one(tmp_path):
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, 0, 0] == 128
    Image.fromarray(np.full((16, 16), 7.5, np.float32)).save(tmp_path / "b.tiff")
    with raises(DataError, "b.tiff", "7.5", 0, 1):
        read_image(tmp_path / "b.tiff")


def write_rgb48(path, values):
    """A PNG of 16 bits a channel, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_16_bit_colours_are_divided_by_257(tmp_path):
    values = np.linspace(0, 65535, 16 * 16 * 3).reshape(16, 16, 3).round().astype(np.uint16)
    write_rgb48(tmp_path / "a.png", values)
    assert np.abs(read_image(tmp_path / "a.png") - values / 257).max() <= 1


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_read_as_the_colours_that_it_prints(tmp_path, name):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / name)
    assert np.abs(read_image(tmp_path / name)[8, 8].astype(int) - (255, 0, 0)).max() <= 3


@pytest.fixture
def half():
    values = np.zeros((16, 16), np.uint8)
    values[:, 8:] = 1
    return values


def test_palette_of_colours_holds_labels_in_a_mask(tmp_path, half):
    image = Image.fromarray(half).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)
    image.save(tmp_path / "m.png")
    assert open_video(tmp_path / "m.png", mask=True).read([0])[0, 0, [0, -1], 0].tolist() == [0, 255]
    assert read_image(tmp_path / "m.png")[0, -1].tolist() == [128, 0, 0]


def test_palette_of_grays_is_read_by_brightness(tmp_path, half):
    image = Image.fromarray(half).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])  # as packers order it: white first
    image.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png")[0, [0, -1], 0].tolist() == [255, 0]


def test_alpha_is_the_mask_when_it_is_all_there_is(tmp_path, half):
    for place, alpha in enumerate((half * 255, np.full_like(half, 255))):
        picture = np.zeros((16, 16, 4), np.uint8)
        picture[..., 3] = alpha
        Image.fromarray(picture).save(tmp_path / f"{place}.png")
    frames = open_video(tmp_path, mask=True).read([0, 1])
    assert frames[0, 0, [0, -1], 0].tolist() == [0, 255]
    assert frames[1].min() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_black_mask_with_alpha_is_black(tmp_path, mode):
    for place in range(2):
        Image.new("RGBA", (16, 16), (0, 0, 0, 255)).convert(mode).save(tmp_path / f"{place}.png")
    for path in (tmp_path, tmp_path / "0.png"):
        clip = open_video(path, mask=True)
        assert clip.read([0]).max() == 0
        assert "by alpha" not in clip.traits


@pytest.mark.parametrize("highest", [1, 255, 300])
def test_16_bit_mask_of_8_bit_values_is_rejected(tmp_path, half, highest):
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "0.png")
    Image.fromarray(half.astype(np.uint16) * highest).save(tmp_path / "1.png")
    for path in (tmp_path / "1.png", tmp_path):
        read = open_video(path, mask=True).read([0])
        with raises(DataError, highest, 65535, 0, 8):
            binarize(read[..., 0], path)


def test_16_bit_mask_of_0_and_65535_reads_as_written(tmp_path, half):
    Image.fromarray(half.astype(np.uint16) * 65535).save(tmp_path / "m.png")
    mask = binarize(read_mask(tmp_path / "m.png")[..., 0], tmp_path / "m.png")
    assert mask[0, [0, -1]].tolist() == [0, 255]
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "m.png")
    assert binarize(read_mask(tmp_path / "m.png")[..., 0], tmp_path / "m.png").max() == 0


def test_flipped_bit_in_a_png_is_found(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    data = bytearray((tmp_path / "mask.png").read_bytes())
    data[data.index(b"IDAT") + 7] ^= 4  # Pillow alone gives other pixels
    (tmp_path / "mask.png").write_bytes(data)
    with raises(DataError, "mask.png"):
        read_mask(tmp_path / "mask.png")


def test_image_above_the_limit_is_rejected_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (13000, 13000)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 100_000
    with raises(DataError, "huge.png", "13000x13000", "MINDSPEED_MM_MAX_PIXELS"):
        read_image(tmp_path / "huge.png")
    monkeypatch.setenv("MINDSPEED_MM_MAX_PIXELS", "many")
    with raises(ConfigError, "many", where="MINDSPEED_MM_MAX_PIXELS"):
        read_image(tmp_path / "huge.png")


def test_large_jpeg_is_reduced_while_decoding(tmp_path, monkeypatch):
    Image.new("RGB", (256, 128), (10, 200, 30)).save(tmp_path / "photo.jpg")
    monkeypatch.setenv("MINDSPEED_MM_MAX_PIXELS", "10000")
    assert read_image(tmp_path / "photo.jpg").shape == (64, 128, 3)


def test_animated_webp_is_a_clip_with_a_clock(tmp_path):
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in (0, 120, 240)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 50, 200], lossless=True)
    clip, info = open_video(path), probe(path)
    assert clip.timed
    assert clip.times == pytest.approx([0, 0.1, 0.15])
    assert (clip.num_frames, info.num_frames, round(info.duration, 3)) == (3, 3, 0.35)
    assert clip.read([2, 0])[:, 0, 0, 0].tolist() == [240, 0]


def test_heic_image_names_what_reads_it(tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        with raises(DataError, "photo.heic", "HEIC"):
            read_image(tmp_path / "photo.heic")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_is_rejected_immediately(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    for look in (open_video, probe, read_image):
        with raises(DataError, "a.mp4"):
            look(tmp_path / "a.mp4")


def test_errors_while_decoding_name_the_file(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:400])
    with (
        raises(DataError, "a.png"),
        open_image(tmp_path / "a.png") as image,
    ):
        image.load()


@pytest.mark.parametrize("folder", [False, True])
def test_mask_that_is_black_and_opaque_is_black(tmp_path, folder):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 3] = 255
    for name in ("1.png", "2.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    clip = open_video(tmp_path if folder else tmp_path / "1.png", mask=True)
    assert clip.read([0]).max() == 0
    assert clip.traits == ()


def test_folder_of_alpha_masks_may_hold_opaque_frames(tmp_path):
    for place, width in enumerate((16, 8)):
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[:, :width, 3] = 255
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
    read = open_video(tmp_path, mask=True).read([0, 1])
    assert read[0].min() == 255
    assert (read[1, :, :8].min(), read[1, :, 8:].max()) == (255, 0)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_read_as_the_colours_it_prints(tmp_path, name):
    red = Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK")
    red.save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
    assert np.abs(read_image(tmp_path / name)[16, 16].astype(int) - (200, 30, 60)).max() <= 3


def test_sixteen_bit_rgb_keeps_its_brightness(tmp_path):
    """Pillow cannot write one; the PNG is put together from its chunks."""
    values = np.array([0, 255, 256, 20000, 40000, 65535], ">u2").reshape(1, 2, 3)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header, rows = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0), zlib.compress(b"\0" + values.tobytes())
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    assert np.abs(read_image(path).astype(int) - np.round(values / 257)).max() <= 1


@pytest.mark.parametrize("interlaced", [False, True], ids=["plain", "interlaced"])
@pytest.mark.parametrize("side", [32, 33])
def test_png_that_lacks_rows_is_rejected(tmp_path, side, interlaced):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(side, interlaced=interlaced))
    assert (read_image(path) == (0x80, 0x80, 0x90)).all()
    for left_out in (1, 9):
        path.write_bytes(png_bytes(side, left_out=left_out, interlaced=interlaced))
        for read in (read_image, read_mask, probe, lambda file: open_video(file).read([0])):
            with raises(DataError, "early", where=path):
                read(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_black_png_of_any_mode_has_all_its_rows(tmp_path, mode):
    path = tmp_path / "a.png"
    for size in ((1, 1), (9, 5), (40, 24)):
        Image.new(mode, size).save(path)
        read_mask(path)
