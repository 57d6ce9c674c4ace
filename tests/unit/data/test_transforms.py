"""Samples in pixels: sizes, cuts, masks and references, against Pillow, torch and closed formulas."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from mindspeed_mm.data.conditions import load_reference, to_tensor
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.resize import resize_to_fill
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.transforms import load_clip, load_mask, load_sample
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from tests.support.clips import numbered, numbers_of, turn, write_clip, write_variable
from tests.support.errors import raises

SMALL = VideoConfig(num_frames=9, max_hxw=96 * 128)


def sample_of(config=SMALL, captions=("a caption",), **files):
    return load_sample(SampleRecord(captions=captions, address="data.json[3]", **files), config)


def numbers(clip):
    """Frame numbers in a [3, T, H, W] clip."""
    return numbers_of(((clip + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize("size", [(120, 160), (200, 96), (97, 131), (40, 30)])
def test_clips_are_scaled_as_pillow_scales_and_cut_at_the_centre(size):
    picture = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    picture = np.asarray(
        Image.fromarray(picture).resize((size[1] // 4, size[0] // 4)).resize(size[::-1])
    )  # smooth
    scale = max(64 / size[0], 80 / size[1])
    rows, columns = max(64, round(size[0] * scale)), max(80, round(size[1] * scale))
    whole = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC)).astype(int)
    top, left = (rows - 64) // 2, (columns - 80) // 2
    assert (
        np.abs(
            resize_to_fill(picture[None].copy(), 64, 80)[0] - whole[top : top + 64, left : left + 80]
        ).max()
        <= 2
    )


def test_pixels_are_uint8_over_127_5_minus_1():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    wanted = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(16, 16).expand(3, 1, 16, 16)
    torch.testing.assert_close(to_tensor(frames).double(), wanted, atol=1e-7, rtol=0)


def test_portrait_clip_stays_portrait_and_keeps_its_frames(tmp_path):
    sample = sample_of(video=write_clip(tmp_path / "v.mp4", 12, height=256, width=144))
    assert sample.video.shape == (3, 9, 144, 80)
    assert numbers(sample.video) == list(range(9))
    assert (sample.frame_policy, sample.fps) == ("trim", 16)


def test_rotated_phone_video_becomes_a_portrait_sample(tmp_path):
    path = turn(write_clip(tmp_path / "flat.mp4", 9, height=144, width=256), tmp_path / "phone.mp4", 90)
    assert sample_of(video=path).video.shape == (3, 9, 144, 80)


def test_variable_rate_is_sampled_by_time(tmp_path):
    path = write_variable(tmp_path / "v.mp4", [0, 20, 40, 60, 300, 320, 500, 520])
    sample = sample_of(VideoConfig(num_frames=5, max_hxw=12288, train_fps=10), video=path)
    assert numbers(sample.video) == [0, 3, 3, 4, 5]


def test_each_stream_is_resized_by_its_own_size(tmp_path):
    sample = sample_of(
        video=write_clip(tmp_path / "v.mp4", 9, height=96, width=128),
        src_video=write_clip(tmp_path / "s.mp4", 9, height=192, width=256),
        src_mask=write_clip(tmp_path / "m.mkv", 9, height=48, width=64),
    )
    assert sample.video.shape == sample.src_video.shape == (3, 9, 96, 128)
    assert numbers(sample.src_video) == list(range(9))
    assert sample.src_mask.shape == (1, 9, 96, 128)
    assert numbers(sample.src_mask.expand(3, -1, -1, -1) * 2 - 1) == list(range(9))


def test_mask_is_binary_even_after_lossy_video(tmp_path):
    soft = np.zeros((9, 96, 128, 3), np.uint8)
    soft[:, 20:70, 30:100] = 255
    video = write_clip(tmp_path / "v.mp4", 9)
    mask = write_video(tmp_path / "m.mp4", soft, 16, quality=45)
    hard = sample_of(video=video, src_mask=mask).src_mask
    assert hard.unique().tolist() == [0, 1]
    assert (hard[0] == torch.from_numpy(soft[..., 0] > 127)).float().mean() > 0.98
    gray = sample_of(SMALL.model_copy(update={"soft_mask": True}), video=video, src_mask=mask).src_mask
    assert len(gray.unique()) > 2


def test_masks_are_resized_to_the_nearest_pixel():
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    resized = load_mask(mask, num_frames=1, height=64, width=64)[0, 0]
    wanted = torch.from_numpy(mask / 255).float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(resized, wanted)


def test_mask_of_zero_and_one_is_rejected():
    with raises(DataError, 0, 1, 255):
        load_mask(np.eye(32, dtype=np.uint8), num_frames=1, height=32, width=32)


def test_still_mask_applies_to_the_whole_clip(tmp_path):
    Image.fromarray(np.tri(96, 128, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    sample = sample_of(video=write_clip(tmp_path / "v.mp4", 9), src_mask=tmp_path / "mask.png")
    assert torch.equal(sample.src_mask, torch.tril(torch.ones(96, 128)).expand(1, 9, -1, -1))


def test_folder_of_images_is_a_mask(tmp_path):
    (tmp_path / "masks").mkdir()
    for i, frame in enumerate(numbered(9)):
        Image.fromarray(frame).save(tmp_path / "masks" / f"{i}.png")
    mask = sample_of(video=write_clip(tmp_path / "v.mp4", 9), src_mask=tmp_path / "masks").src_mask
    assert numbers(mask.expand(3, -1, -1, -1) * 2 - 1) == list(range(9))


def test_transparent_parts_of_a_mask_image_are_kept(tmp_path):
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[:16] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", num_frames=5, height=32, width=32)
    assert mask.shape == (1, 5, 32, 32)
    assert mask[0, 0, :, 0].tolist() == [1.0] * 16 + [0.0] * 16


@pytest.mark.parametrize("size", [(50, 100), (100, 50), (200, 300)])
def test_reference_is_letterboxed_on_white(size):
    picture = np.random.default_rng(0).integers(0, 200, (*size, 3), dtype=np.uint8)
    canvas = load_reference(picture, 96, 128)
    scale = min(96 / size[0], 128 / size[1])
    rows, columns = int(size[0] * scale), int(size[1] * scale)
    top, left = (96 - rows) // 2, (128 - columns) // 2
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    inner = interpolate(pixels, size=(rows, columns), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(canvas[:, 0, top : top + rows, left : left + columns], inner)
    canvas[:, 0, top : top + rows, left : left + columns] = 1
    assert torch.equal(canvas, torch.ones(3, 1, 96, 128))


def test_reference_of_the_right_size_is_not_touched():
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    assert torch.equal(load_reference(picture, 96, 128), to_tensor(picture[None]))


def test_alpha_of_a_reference_becomes_white(tmp_path):
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:32] = (255, 0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "ref.png")
    canvas = load_reference(tmp_path / "ref.png", 64, 64)
    assert canvas[:, 0, 10, 10].tolist() == [1, -1, -1]
    assert canvas[:, 0, 50, 10].tolist() == [1, 1, 1]
    assert torch.equal(canvas, load_reference(Image.open(tmp_path / "ref.png"), 64, 64))


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 1), (5, 5), (8, 5), (9, 9), (10, 9)])
def test_clips_of_any_length_become_4k_plus_1_frames(tmp_path, count, kept):
    assert sample_of(video=write_clip(tmp_path / "v.mp4", count)).video.shape[1] == kept


@pytest.mark.parametrize("reader", ["DecordVideo", "AvVideo"])
def test_padding_repeats_the_last_frame_in_every_stream(tmp_path, reader):
    config = SMALL.model_copy(update={"short_clip": "pad", "video_reader_type": reader})
    clip = write_clip(tmp_path / "v.mp4", 6)
    sample = sample_of(config, video=clip, src_video=clip)
    assert numbers(sample.video) == numbers(sample.src_video) == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert sample.frame_indices == (0, 1, 2, 3, 4, 5, 5, 5, 5)


def test_captions_and_names_may_be_in_any_script(tmp_path):
    folder = tmp_path / "视频 données"
    folder.mkdir()
    sample = sample_of(video=write_clip(folder / "第一.mp4", 5), captions=("一个红色的圆", "κύκλος"))
    assert sample.captions == ("一个红色的圆", "κύκλος")
    assert numbers(sample.video) == list(range(5))


def test_error_begins_with_the_rows_address(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 1000)
    with raises(DataError, "data.json[3]", "bad.mp4"):
        sample_of(video=tmp_path / "bad.mp4")


def test_user_input_may_be_frames_in_memory():
    clip = load_clip(numbered(7), num_frames=9, height=48, width=64, policy="pad")
    assert clip.shape == (3, 9, 48, 64)
    assert numbers(clip) == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    with raises(DataError, "[2, 3]", "[T, H, W, 3]"):
        load_clip(np.zeros((2, 3)), num_frames=1, height=16, width=16)
