"""The switches that repeat other projects: each equals its project's formula, and is off by default."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import parse
from mindspeed_mm.data.conditions import stretched_reference
from mindspeed_mm.data.config import ClipPolicy, VideoConfig
from mindspeed_mm.data.dataset import pixel_settings
from mindspeed_mm.data.frames import choose, spread_to_last
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.conditions import load_conditions
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.denoise import denoise
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.loras_config import FEW_STEPS
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import Inputs
from mindspeed_mm.generation.result import PromptEmbeds
from mindspeed_mm.generation.sampling_config import Preset, SamplingConfig
from mindspeed_mm.generation.solvers.solver import sigma_table, timestep_table
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_transformer

SWITCHES = ("diffsynth_noise", "diffsynth_references", "videoxfun_sigmas", "wan_frames")
CPU = Accelerator.detect("cpu")


def test_switches_are_off_by_default():
    sampling = resolve_sampling(RequestConfig(), experts=1)
    assert [getattr(sampling, name) for name in SWITCHES] == [False] * 4


@pytest.mark.parametrize("page", ["docs/reference/parity.md", "docs/zh/reference/parity.md"])
def test_page_has_every_switch(page):
    text = (Path(__file__).resolve().parents[3] / page).read_text(encoding="utf-8")
    presets = set(get_args(Preset)) - {"wan", *FEW_STEPS}
    assert presets == {"diffsynth", "diffusers", "mindspeed"}
    flags = [
        *(f"`--preset {name}`" for name in presets),
        *(f"`--{name.replace('_', '-')}`" for name in SWITCHES),
    ]
    assert [flag for flag in flags if flag not in text] == []


# ---- DiffSynth


def test_diffsynth_noise_puts_the_last_frames_first():
    models = ModelStore(Experts([tiny_transformer()], CPU), None, None, accelerator=CPU)
    rows = torch.randn(7, TINY.trunk.text_dim, generator=torch.Generator().manual_seed(1))
    prompts = PromptEmbeds(prompt_embeds=rows, negative_prompt_embeds=None)
    context = torch.randn(96, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    request = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "guidance_scale": 1}
    noise = make_noise((4, 4, 6), 2025)
    rotated = torch.concat(
        (noise[:, -2:], noise[:, :-2]), dim=1
    )  # DiffSynth's own expression, without the batch axis

    def latents(noise=None, **more):
        sampling = resolve_sampling(RequestConfig(**request, **more), experts=1)
        return denoise(models, context, [prompts], sampling, num_refs=2, noise=noise)

    assert torch.equal(latents(diffsynth_noise=True), latents(rotated))
    assert torch.equal(latents(), latents(noise))
    assert not torch.equal(latents(), latents(rotated))


def test_diffsynth_references_are_stretched_with_pillow():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    expected = torch.from_numpy(np.asarray(image.resize((48, 32))).copy()).float() / 127.5 - 1
    found = stretched_reference(image, 32, 48)
    torch.testing.assert_close(found[:, 0].permute(1, 2, 0), expected, atol=1e-6, rtol=0)
    sampling = SamplingConfig(height=32, width=48, num_frames=5, diffsynth_references=True)
    conditions = load_conditions(Inputs(src_ref_images=[np.asarray(image)]), sampling)
    assert torch.equal(conditions.src_ref_images[0], found)


# ---- VideoX-Fun


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.0])
def test_videoxfun_sigmas_match_diffusers_shifted_euler(shift):
    for steps in (1, 2, 20, 40, 50):
        oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
        oracle.set_timesteps(steps)
        sampling = resolve_sampling(RequestConfig(steps=steps, shift=shift, videoxfun_sigmas=True), experts=1)
        assert sampling.solver == "euler"
        torch.testing.assert_close(sigma_table(sampling), oracle.sigmas, atol=1e-7, rtol=0)
        torch.testing.assert_close(timestep_table(sampling), oracle.timesteps, atol=1e-4, rtol=0)


def test_videoxfun_sigmas_reject_another_solver():
    with raises(ConfigError, "videoxfun_sigmas", "euler", "unipc"):
        parse(RequestConfig, {"videoxfun_sigmas": True, "solver": "unipc"}, "x.json")


# ---- Wan2.1


def official_keep_last(starts, ends, cap):
    """The published rule: how many frames a clip gives, and which."""
    stamps = np.array(list(zip(starts, ends, strict=True)), dtype=np.float32)
    count = (min((len(stamps) - 1) // 4 + 1, cap) - 1) * 4 + 1
    moments = np.linspace(0.0, stamps[-1].mean(), count)
    shown = np.logical_and(moments[:, None] >= stamps[None, :, 0], moments[:, None] <= stamps[None, :, 1])
    return count, np.argmax(shown, axis=1).tolist()


@pytest.mark.parametrize("length", [5, 17, 80, 81, 82, 120, 200])
@pytest.mark.parametrize("fps", [8, 16, 24, 29.97])
def test_wan_frames_match_keep_last(length, fps):
    times = [i / fps for i in range(length)]
    count, expected = official_keep_last(times, [*times[1:], length / fps], 21)
    chosen = spread_to_last(times, duration=length / fps, num_frames=81, fps=16.0)
    assert len(chosen.indices) == count
    assert list(chosen.indices) == expected
    assert chosen.indices[-1] == length - 1


def test_wan_frames_name_the_frames_that_a_short_clip_gives():
    clip = np.zeros((11, 32, 48, 3), dtype=np.uint8)
    sampling = SamplingConfig(height=32, width=48, num_frames=17, wan_frames=True)
    with raises(DataError, 11, "num_frames", 9):
        load_conditions(Inputs(src_video=clip), sampling)


def test_wan_frames_reach_the_model(tmp_path):
    clip = np.repeat(np.arange(20, dtype=np.uint8)[:, None, None, None] * 10, 3, axis=3)
    clip = np.broadcast_to(clip, (20, 32, 48, 3)).copy()
    sampling = SamplingConfig(height=32, width=48, num_frames=5, wan_frames=True)
    shown = load_conditions(Inputs(src_video=clip), sampling).src_video[0, :, 0, 0]
    _, expected = official_keep_last([i / 16 for i in range(20)], [(i + 1) / 16 for i in range(20)], 2)
    assert ((shown + 1) * 12.75).round().int().tolist() == expected


def test_wan_frames_of_extraction_name_their_features_apart():
    clip = SimpleNamespace(
        times=[i / 24 for i in range(50)], duration=50 / 24, timed=True, num_frames=50, path="clip"
    )
    chosen = choose(clip, ClipPolicy(num_frames=17, wan_frames=True))
    assert (len(chosen.indices), chosen.indices[-1], chosen.policy) == (17, 49, "keep_last")
    assert "wan_frames" not in pixel_settings(VideoConfig())
    assert pixel_settings(VideoConfig(wan_frames=True))["wan_frames"] is True
