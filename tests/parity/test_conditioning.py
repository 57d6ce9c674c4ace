"""Our vace_context against diffusers' WanVACEPipeline on the same pixels, mask, references and VAE."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline
from PIL import Image

from mindspeed_mm.conditioning.vace import encode_features, encode_vace_context, fold_mask
from mindspeed_mm.data.conditions import load_reference, to_tensor
from mindspeed_mm.data.sample import VideoSample
from tests.support.tiny import tiny_vae

T, H, W = 17, 48, 64


class PlainVae:
    """diffusers' VAE with Wan's normalization, written out."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model
        self.device = torch.device("cpu")
        self.mean = torch.tensor(model.config.latents_mean).view(1, 16, 1, 1, 1)
        self.std = torch.tensor(model.config.latents_std).view(1, 16, 1, 1, 1)

    @torch.no_grad()
    def encode(self, video):
        return (self.model.encode(video).latent_dist.mode() - self.mean) / self.std


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def pipeline(vae):
    pipe = WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=UniPCMultistepScheduler(), transformer=None
    )
    patches = type("Patches", (), {"config": type("Config", (), {"patch_size": (1, 2, 2)})})
    pipe.transformer = patches  # all that the three methods ask of a transformer
    return pipe


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (T, H // 4, W // 4, 3), dtype=np.uint8)
    return base.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def mask():
    values = np.zeros((T, H, W), np.uint8)
    for t in range(T):
        values[t, t : t + 21, 5 : 30 + t] = 255
    return values


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def oracle(pipeline, pixels, mask, references):
    """[96, R+F, h, w] as diffusers makes it."""
    video = None if pixels is None else [Image.fromarray(frame) for frame in pixels]
    masks = None if mask is None else [Image.fromarray(frame).convert("RGB") for frame in mask]
    images = [Image.fromarray(image) for image in references] or None
    with torch.no_grad():
        clip, soft, refs = pipeline.preprocess_conditions(
            video, masks, images, 1, H, W, T, torch.float32, torch.device("cpu")
        )
        latents = pipeline.prepare_video_latents(clip, soft, refs, None, torch.device("cpu"))
        cells = pipeline.prepare_masks(soft, refs, None)
    return torch.cat([latents, cells], dim=1)[0]


def ours(vae, pixels, mask, references):
    video = None if pixels is None else to_tensor(pixels)
    soft = None if mask is None else torch.from_numpy(mask).float().div(255)[None]
    refs = [load_reference(image, H, W) for image in references]
    return encode_vace_context(PlainVae(vae), video, soft, refs, num_frames=T, height=H, width=W)


@pytest.mark.parametrize(
    "references", [[], [picture(1, H, W)], [picture(2, 64, 40)]], ids=["none", "fits", "letterbox"]
)
def test_video_mask_and_reference_give_diffusers_context(vae, pipeline, pixels, mask, references):
    expected = oracle(pipeline, pixels, mask, references)
    found = ours(vae, pixels, mask, references)
    assert found.shape == expected.shape == (96, len(references) + 5, H // 8, W // 8)
    assert (found - expected).abs().max() <= 2e-6


def test_no_source_and_no_mask_give_diffusers_context(vae, pipeline, pixels):
    assert (ours(vae, None, None, []) - oracle(pipeline, None, None, [])).abs().max() <= 2e-6
    assert (ours(vae, pixels, None, []) - oracle(pipeline, pixels, None, [])).abs().max() <= 2e-6


def test_soft_mask_is_cut_for_the_split_and_soft_in_the_cells(vae, pipeline, pixels):
    ramp = np.broadcast_to(np.linspace(0, 255, W).astype(np.uint8), (T, H, W)).copy()
    found = ours(vae, pixels, ramp, [])
    assert (found - oracle(pipeline, pixels, ramp, [])).abs().max() <= 2e-6
    hard = ours(vae, pixels, np.where(ramp > 127, 255, 0).astype(np.uint8), [])
    assert torch.equal(found[:32], hard[:32])
    assert len(found[32:].unique()) > 2


def test_references_keep_their_order(vae, pipeline, pixels, mask):
    first, second = picture(3, H, W), picture(4, H, W)
    expected = oracle(pipeline, pixels, mask, [first, second])
    found = ours(vae, pixels, mask, [first, second])
    assert (found - expected).abs().max() > 0.1
    swapped = torch.cat([expected[:, 1:2], expected[:, :1], expected[:, 2:]], dim=1)
    assert (found - swapped).abs().max() <= 2e-6


def test_each_reference_is_encoded_alone(vae, pixels):
    """Published extractors encode all references as one clip.

    Two of them become one latent frame that holds the first only.
    """
    plain = PlainVae(vae)
    references = [load_reference(picture(seed, H, W), H, W) for seed in (5, 6, 7)]
    clip = to_tensor(pixels)
    sample = VideoSample(
        video=clip, src_video=None, src_mask=None, src_ref_images=tuple(references), captions=("a",), fps=16.0
    )
    latents, _ = encode_features(plain, sample)
    assert latents.shape == (16, 3 + 5, H // 8, W // 8)
    for place, reference in enumerate(references):
        assert torch.equal(latents[:, place : place + 1], plain.encode(reference[None])[0])
    as_one_clip = plain.encode(torch.cat(references, dim=1)[None])[0]
    assert as_one_clip.shape[1] == 1
    assert (as_one_clip - latents[:, :1]).abs().max() <= 2e-6


@pytest.mark.parametrize("frames", [1, 5, 13, 17, 49, 77, 81])
def test_mask_frames_are_diffusers_nearest_exact(pipeline, frames):
    soft = torch.rand(1, frames, 32, 48, generator=torch.Generator().manual_seed(frames))
    assert torch.equal(fold_mask(soft), pipeline.prepare_masks(soft[None], [[]], None)[0])
