"""The pixel side of conditioning against closed formulas, with a VAE that only counts and averages."""

import math

import pytest
import torch

from mindspeed_mm.conditioning.vace import (
    StreamEncoder,
    encode_features,
    encode_vace_context,
    fold_mask,
    mask_frames,
    plan_context,
)
from mindspeed_mm.data.sample import VideoSample
from mindspeed_mm.errors import DataError
from tests.support.errors import raises

T, H, W = 9, 32, 48


class MeanVae:
    """A stand-in VAE: the mean of each cell, and one more so that gray is not zero."""

    device = torch.device("cpu")

    def __init__(self):
        self.batches = []

    def encode(self, video):
        self.batches.append(tuple(video.shape))
        frames = (video.shape[2] + 3) // 4
        cells = torch.nn.functional.adaptive_avg_pool3d(
            video, (frames, video.shape[3] // 8, video.shape[4] // 8)
        )
        return cells.repeat(1, 6, 1, 1, 1)[:, :16] + 1


def clip(seed=0, frames=T):
    return torch.rand(3, frames, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def box_mask():
    mask = torch.zeros(1, T, H, W)
    mask[:, :, 3:17, 10:30] = 1
    return mask


def sample(**changes):
    values = {
        "video": clip(),
        "src_video": None,
        "src_mask": None,
        "src_ref_images": (),
        "captions": ("a",),
        "fps": 16.0,
    }
    return VideoSample(**{**values, **changes})


def context(vae, video, mask, refs=()):
    return encode_vace_context(vae, video, mask, refs, num_frames=T, height=H, width=W)


def test_mask_cells_follow_the_closed_formula():
    mask = torch.rand(1, T, H, W, generator=torch.Generator().manual_seed(1))
    cells = fold_mask(mask)
    assert cells.shape == (64, 3, H // 8, W // 8)
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        py, px = (int(v) for v in torch.randint(8, (2,), generator=generator))
        f, y, x = (int(torch.randint(n, (1,), generator=generator)) for n in cells.shape[1:])
        t = math.floor((f + 0.5) * T / 3)
        assert cells[8 * py + px, f, y, x] == mask[0, t, 8 * y + py, 8 * x + px]


def test_frames_of_81_and_17_are_the_measured_ones():
    assert mask_frames(17) == (1, 5, 8, 11, 15)
    assert mask_frames(81) == (
        1,
        5,
        9,
        13,
        17,
        21,
        25,
        28,
        32,
        36,
        40,
        44,
        48,
        52,
        55,
        59,
        63,
        67,
        71,
        75,
        79,
    )


@pytest.mark.parametrize("frames", [1, 5, 9, 29, 121, 241])
def test_mask_frames_are_the_middles_of_equal_parts(frames):
    parts = (frames + 3) // 4
    assert mask_frames(frames) == tuple(math.floor((i + 0.5) * frames / parts) for i in range(parts))


def test_inactive_and_reactive_share_the_pixels_out():
    video, mask = clip(), box_mask()
    plan = plan_context(video, mask, num_frames=T, height=H, width=W)
    assert torch.equal(plan.inactive + plan.reactive, video)
    assert not plan.inactive[:, :, 3:17, 10:30].any()
    assert torch.equal(plan.reactive[:, :, 3:17, 10:30], video[:, :, 3:17, 10:30])


def test_context_channels_and_references_are_ordered():
    vae, video, mask = MeanVae(), clip(), box_mask()
    refs = [clip(seed, frames=1) for seed in (3, 4)]
    found = context(vae, video, mask, refs)
    assert found.shape == (96, 2 + 3, H // 8, W // 8)
    assert torch.equal(found[:16, 2:], vae.encode((video * (1 - mask))[None])[0])
    assert torch.equal(found[16:32, 2:], vae.encode((video * mask)[None])[0])
    assert torch.equal(found[32:, 2:], fold_mask(mask))
    for place, ref in enumerate(refs):
        assert torch.equal(found[:16, place : place + 1], vae.encode(ref[None])[0])
    assert not found[16:, :2].any()


def test_latents_carry_the_references_in_their_order():
    vae = MeanVae()
    refs = [clip(seed, frames=1) for seed in (3, 4)]
    found, _ = encode_features(vae, sample(src_ref_images=refs))
    parts = [vae.encode(part[None])[0] for part in (*refs, clip())]
    assert torch.equal(found, torch.cat(parts, dim=1))


def test_features_hold_the_context_that_generation_makes():
    vae = MeanVae()
    refs = (clip(3, frames=1),)
    _, found = encode_features(vae, sample(src_video=clip(1), src_mask=box_mask(), src_ref_images=refs))
    assert torch.equal(found, context(vae, clip(1), box_mask(), refs))


def test_mask_without_a_source_masks_the_target_video():
    vae = MeanVae()
    found = encode_features(vae, sample(src_mask=box_mask()))[1]
    assert torch.equal(found, context(vae, clip(), box_mask()))


def test_without_any_condition_everything_is_generated_from_gray():
    found = encode_features(MeanVae(), sample())[1]
    assert torch.equal(found[:32], torch.ones_like(found[:32]))  # MeanVae's gray
    assert torch.equal(found[32:], torch.ones_like(found[32:]))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"src_mask": torch.ones(1, 5, H, W)}, ("src_mask", "[1, 5, 32, 48]", "[1, 9, 32, 48]")),
        ({"src_video": torch.zeros(3, T, 16, W)}, ("src_video",)),
        ({"src_ref_images": (torch.zeros(3, 1, 16, 16),)}, ("src_ref_images[0]",)),
        ({"video": torch.zeros(3, 8, H, W)}, ("8 frames", 5)),
        ({"video": torch.zeros(3, T, 24, W)}, ("48x24", 16)),
    ],
)
def test_mismatch_is_rejected(changes, facts):
    with raises(DataError, *facts):
        encode_features(MeanVae(), sample(**changes))


def test_plain_clips_encode_one_stream_and_control_clips_two():
    encoder = StreamEncoder(MeanVae())
    encode_features(encoder, sample())
    assert encoder.encoded == 2  # the video, and gray for the first time
    encode_features(encoder, sample(video=clip(7)))
    assert encoder.encoded == 3
    encode_features(encoder, sample(src_video=clip(8)))
    assert encoder.encoded == 5  # the video and the reactive stream; inactive is gray
    assert encoder.requested == 9


def test_cached_gray_has_the_bits_of_encoded_gray():
    cached = StreamEncoder(MeanVae())
    first, second = (encode_features(cached, sample())[1] for _ in range(2))
    fresh = encode_features(StreamEncoder(MeanVae()), sample())[1]
    assert torch.equal(first, second)
    assert torch.equal(first, fresh)


def test_gray_latents_are_cached_by_size_and_bounded():
    encoder = StreamEncoder(MeanVae(), max_gray=2)
    for frames in (1, 5, 9, 9, 5):
        encoder.encode([torch.zeros(3, frames, H, W)])
    assert encoder.encoded == 3
    encoder.encode([torch.zeros(3, 1, H, W)])  # pushed out by 9
    assert encoder.encoded == 4


def test_equal_sizes_go_together_and_equal_pixels_once():
    vae = MeanVae()
    encoder = StreamEncoder(vae, max_batch=4)
    one, two, ref = clip(1), clip(2), clip(3, frames=1)
    answers = encoder.encode([one, ref, two, one.clone()])
    assert sorted(vae.batches) == [(1, 3, 1, H, W), (2, 3, T, H, W)]
    assert torch.equal(answers[0], answers[3])
    alone = StreamEncoder(MeanVae()).encode([one, ref, two])
    for together, single in zip(answers, alone, strict=False):
        assert torch.equal(together, single)
