"""A whole generation is that of diffusers' WanVACEPipeline.

Same weights, pixels, noise and sigmas, latents within 1e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.solvers.solver import sigma_table, timestep_table
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.wan.vae import WanVae
from tests.support.tiny import TINY, tiny_transformer, tiny_vae

FRAMES, HEIGHT, WIDTH = 9, 48, 64
ORACLES = {
    "unipc": (UniPCMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
}


@pytest.fixture(scope="module")
def models():
    """Two transformers that differ, and one VAE."""
    return [tiny_transformer(seed) for seed in (0, 1)], tiny_vae()


def oracle_of(model):
    trunk = model.config.trunk
    oracle = WanVACETransformer3DModel(
        patch_size=trunk.patch_size,
        num_attention_heads=trunk.num_heads,
        attention_head_dim=trunk.head_dim,
        text_dim=trunk.text_dim,
        freq_dim=trunk.freq_dim,
        ffn_dim=trunk.ffn_dim,
        num_layers=trunk.num_layers,
        eps=trunk.eps,
        vace_layers=list(model.config.vace_layers),
        vace_in_channels=model.config.vace_in_dim,
    )
    names = KEY_MAPS["diffusers"]
    oracle.load_state_dict({names.to_theirs(name): weight for name, weight in model.state_dict().items()})
    return oracle.eval()


def oracle_scheduler(sampling):
    """diffusers' scheduler of the same name, made to stand on our sigmas whenever the pipeline sets it up."""
    kind, settings = ORACLES[sampling.solver]
    scheduler = kind(**settings)
    own = scheduler.set_timesteps

    def set_timesteps(steps, device=None, **_):
        own(steps, device=device)
        scheduler.sigmas, scheduler.timesteps = sigma_table(sampling), timestep_table(sampling)
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps
    return scheduler


def sources(references):
    """A clip with a moving mask, and pictures of another shape, as bytes."""
    rng = np.random.default_rng(3)
    video = rng.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    for t in range(FRAMES):
        mask[t, 8:30, 3 + 4 * t : 20 + 4 * t] = 255
    images = [rng.integers(0, 256, (40, 24, 3), dtype=np.uint8) for _ in range(references)]
    return video, mask, images


def text(seed, length):
    return torch.randn(length, TINY.trunk.text_dim, generator=torch.Generator().manual_seed(seed))


CASES = [
    {"solver": "unipc", "guidance_scale": 5.0},
    {"solver": "unipc", "guidance_scale": 1.0, "references": 1},
    {
        "solver": "unipc",
        "grid": "diffusers",
        "guidance_scale": 5.0,
        "references": 1,
        "context_scale": (0.7, 0.2),
    },
    {"solver": "euler", "guidance_scale": 5.0, "references": 1},
    {"solver": "euler", "guidance_scale": 1.0},
    {"solver": "dpm++", "guidance_scale": 5.0},
    {"solver": "unipc", "guidance_scale": 4.0, "guidance_scale_2": 2.0, "experts": 2, "references": 1},
    {"solver": "euler", "guidance_scale": 4.0, "guidance_scale_2": 3.0, "experts": 2},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_latents_and_frames_match_diffusers(models, case):
    case = dict(case)
    count, references, grid = case.pop("experts", 1), case.pop("references", 0), case.pop("grid", "official")
    transformers, vae = models[0][:count], models[1]
    request = RequestConfig(height=HEIGHT, width=WIDTH, num_frames=FRAMES, steps=5, **case)
    sampling = resolve_sampling(request, experts=count).model_copy(update={"grid": grid})
    video, mask, images = sources(references)
    noise = make_noise((references + 3, HEIGHT // 8, WIDTH // 8), 7)
    words = {"prompt": text(1, 7), "negative": text(2, 11)}

    accelerator = Accelerator.detect("cpu")
    store = ModelStore(Experts(transformers, accelerator), WanVae(vae, "tiny"), None, accelerator=accelerator)
    store.cached_prompts.update(words)
    inputs = Inputs(src_video=video, src_mask=mask, src_ref_images=images)
    ours = VacePipeline(store).generate(
        GenerationRequest(
            prompt="prompt", negative_prompt="negative", inputs=inputs, sampling=sampling, noise=noise
        )
    )

    theirs = run_oracle(transformers, tiny_vae(), sampling, (video, mask, images), noise, words)
    latents = theirs("latent")
    assert ours.latents.shape == latents[0].shape == (16, references + 3, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(ours.latents, latents[0], atol=1e-4, rtol=1e-4)
    frames = (torch.as_tensor(theirs("np")[0]) * 255).round().numpy()
    assert ours.frames.shape == frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(ours.frames.astype(int) - frames.astype(int)).max() <= 1


def run_oracle(transformers, vae, sampling, pixels, noise, words):
    pipe = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=oracle_scheduler(sampling),
        transformer=oracle_of(transformers[0]),
        transformer_2=oracle_of(transformers[1]) if len(transformers) == 2 else None,
        boundary_ratio=sampling.boundary if len(transformers) == 2 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    video, mask, images = pixels
    pad = {
        name: F.pad(rows, (0, 0, 0, TINY.trunk.text_len - len(rows)))[None] for name, rows in words.items()
    }
    scale = sampling.context_scale

    def run(output_type):
        return pipe(
            prompt_embeds=pad["prompt"],
            negative_prompt_embeds=pad["negative"],
            video=[Image.fromarray(frame) for frame in video],
            mask=[Image.fromarray(frame).convert("RGB") for frame in mask],
            reference_images=[Image.fromarray(image) for image in images] or None,
            conditioning_scale=list(scale) if isinstance(scale, tuple) else scale,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            guidance_scale_2=sampling.guidance_scale_2 if len(transformers) == 2 else None,
            latents=noise[None].clone(),
            output_type=output_type,
        ).frames

    return run


def test_two_experts_of_the_case_above_both_work(models):
    sampling = resolve_sampling(RequestConfig(steps=5), experts=2)
    experts = Experts(models[0], Accelerator.detect("cpu"))
    asked = [experts.index_at(float(timestep), sampling.boundary) for timestep in timestep_table(sampling)]
    assert asked == sorted(asked)
    assert set(asked) == {0, 1}
