"""A video whose latents or pixels are NaN or infinite stops the run.

The message names the step and the likely setting.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import NonFiniteError
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.denoise import denoise
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.finite import explain_pixels
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.outputs import VideoFiles
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.result import PromptEmbeds
from mindspeed_mm.generation.run import generate
from mindspeed_mm.models.wan.vae import WanVae
from mindspeed_mm.tasks.generate_videos import run_settings
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_transformer, tiny_vae

CPU = Accelerator.detect("cpu")
SMALL = {"height": 32, "width": 48, "num_frames": 5, "steps": 3}
ROWS = torch.randn(7, TINY.trunk.text_dim, generator=torch.Generator().manual_seed(1))
PROMPTS = PromptEmbeds(prompt_embeds=ROWS, negative_prompt_embeds=ROWS[:4].flip(0))


def store(model=None, vae=None):
    models = ModelStore(Experts([model or tiny_transformer()], CPU), vae, None, accelerator=CPU)
    models.cached_prompts.update({"a": ROWS, "b": ROWS[:4].flip(0)})
    return models


def latents_of(models, **numbers):
    """`numbers` are set behind the config's back, which refuses such ones."""
    sampling = resolve_sampling(RequestConfig(**SMALL), experts=1).model_copy(update=numbers)
    context = torch.randn(96, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    return denoise(models, context, [PROMPTS], sampling)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("guidance_scale", 1e38), ("context_scale", 1e38), ("shift", 1e-300), ("shift", 1e300)],
)
def test_extreme_setting_is_named_with_its_step(setting, value):
    with raises(NonFiniteError, "of 3", f"{setting} {value:g}"):
        latents_of(store(), **{setting: value})


def test_nan_weight_is_named_where_it_spoils_the_step():
    model = tiny_transformer()
    with torch.no_grad():
        model.blocks[1].ffn[0].weight[0, 0] = float("nan")
    with raises(NonFiniteError, "step 1 of 3", "blocks.1.ffn.0.weight"):
        latents_of(store(model))


def test_nan_prompt_names_the_text_encoder():
    models = store()
    sampling = resolve_sampling(RequestConfig(**SMALL), experts=1)
    prompts = PromptEmbeds(prompt_embeds=ROWS * float("nan"), negative_prompt_embeds=ROWS)
    with raises(NonFiniteError, "text encoder"):
        denoise(models, torch.zeros(96, 2, 4, 6), [prompts], sampling)
    with raises(NonFiniteError, "VAE"):
        denoise(models, torch.full((96, 2, 4, 6), torch.inf), [PROMPTS], sampling)


def test_finite_video_is_not_changed_by_the_check():
    first, again = latents_of(store()), latents_of(store())
    assert first.isfinite().all()
    assert torch.equal(first, again)


def test_nan_pixels_leave_latents_but_no_video(tmp_path):
    vae = tiny_vae()
    job, video = a_job(tmp_path)
    models = store(vae=WanVae(vae, "tiny"))
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(float("nan"))
    with raises(NonFiniteError, 0, "decoder.conv_out.bias", "--from-latents") as caught:
        generate(models, video, VideoFiles(models, tmp_path / "out", run_settings(job)).write)
    assert str(tmp_path / "out" / "v" / "latents.safetensors") in str(caught.value)
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert written == ["v", "v/latents.safetensors"]


def a_job(folder: Path):
    config = {
        "model": {"transformer": ["t"], "vae": "v", "text_encoder": "e"},
        "prompt": "a",
        "negative_prompt": "b",
        "name": "v",
        "output_path": str(folder / "out"),
        **SMALL,
    }
    for name in "tve":
        (folder / name).touch()
    (folder / "c.json").write_text(json.dumps(config))
    job = GenerateJob.from_file(folder / "c.json")
    return job, job.videos[0]


def test_tall_latents_are_the_likely_cause_of_nan_pixels():
    error = explain_pixels(0, tiny_vae(), torch.full((16, 1, 2, 2), 1e20))
    assert "1e+20" in str(error)
    assert "guidance_scale" in str(error)


def test_whole_call_writes_nothing_for_a_nan_video(tmp_path):
    pipe = VacePipeline(store(vae=WanVae(tiny_vae(), "tiny")))
    sampling = resolve_sampling(RequestConfig(**SMALL), experts=1).model_copy(update={"shift": 1e-300})
    with raises(NonFiniteError, "shift"):
        pipe.generate(GenerationRequest(prompt="a", negative_prompt="b", sampling=sampling))
