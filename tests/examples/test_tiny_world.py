"""The tiny world's shipped weights give the same video in every dialect and in diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from checkpoint.cli import main as convert
from mindspeed_mm.generation.config import RequestConfig, WeightPaths
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.solvers.solver import sigma_table, timestep_table
from mindspeed_mm.generation.stages import encode_prompts

WEIGHTS = Path(__file__).resolve().parents[2] / "examples/vace/tiny/weights"
SCENE = world.make_scene("heldout", 3)
ASKED = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "steps": 4,
    "shift": 3.0,
    "guidance_scale": 1.0,
    "solver": "euler",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dialects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped VACE in each form that mm-convert writes."""
    folder = tmp_path_factory.mktemp("dialects")
    paths = {"official": WEIGHTS / "vace"}
    for name, method, source, target in (
        ("mm", "hf_to_mm", "official", "mm"),
        ("mm in stages", "resplit", "mm", "stages"),
        ("diffusers", "mm_to_hf_diffusers", "mm", "diffusers"),
        ("one .pt", "mm_to_hf", "mm in stages", "vace.pt"),
    ):
        more = ["--cfg.target_parallel_config.pp_layers", "[1,3]"] if name == "mm in stages" else []
        convert(
            [
                "VACEConverter",
                method,
                "--cfg.source_path",
                str(paths[source]),
                "--cfg.target_path",
                str(folder / target),
                *more,
            ]
        )
        paths[name] = folder / target
    return paths


def sources() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """An inpaint request: clip, mask, one reference image."""
    video, mask = world.condition(SCENE, "inpaint", world.render(SCENE), 3)
    assert video is not None
    assert mask is not None
    return video, mask[..., 0], [world.reference_image(SCENE)]


def pipeline(transformer: Path) -> VacePipeline:
    """Our pipeline in fp32 on a CPU."""
    paths = WeightPaths(
        transformer=(str(transformer),),
        vae=str(WEIGHTS / "Wan2.1_VAE.pth"),
        text_encoder=str(WEIGHTS / "models_t5_umt5-xxl-enc-bf16.pth"),
    )
    return VacePipeline.from_pretrained(paths, dtype=torch.float32, device="cpu")


def generate(transformer: Path) -> torch.Tensor:
    """[16, R+F, h, w]: the latents of one request."""
    video, mask, images = sources()
    result = pipeline(transformer)(
        SCENE.caption,
        src_video=video,
        src_mask=mask,
        src_ref_images=images,
        noise=make_noise((6, 8, 8), 5),
        **ASKED,
    )
    return result.latents


@pytest.fixture(scope="module")
def official() -> torch.Tensor:
    """The latents that the shipped files generate."""
    return generate(WEIGHTS / "vace")


@pytest.mark.parametrize("name", ["mm", "mm in stages", "diffusers", "one .pt"])
def test_every_dialect_generates_the_same_latents(
    name: str, dialects: dict[str, Path], official: torch.Tensor
) -> None:
    assert torch.equal(generate(dialects[name]), official)


def test_diffusers_generates_same_latents_from_our_export(
    dialects: dict[str, Path], official: torch.Tensor
) -> None:
    settings = json.loads((dialects["diffusers"] / "config.json").read_text())
    model = WanVACETransformer3DModel.from_config(settings)
    model.load_state_dict(load_file(dialects["diffusers"] / "diffusion_pytorch_model.safetensors"))
    ours = pipeline(WEIGHTS / "vace")
    sampling = resolve_sampling(RequestConfig(**ASKED), experts=1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    own = scheduler.set_timesteps

    def set_timesteps(steps: int, device: torch.device | None = None, **_: object) -> None:
        own(steps, device=device)
        scheduler.sigmas, scheduler.timesteps = sigma_table(sampling), timestep_table(sampling)
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps
    prompt = encode_prompts(ours.models, [SCENE.caption])[SCENE.caption].float()
    oracle = WanVACEPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=ours.models.vae.model,
        scheduler=scheduler,
        transformer=model.float().eval(),
    )
    oracle.set_progress_bar_config(disable=True)
    video, mask, images = sources()
    latents = oracle(
        prompt_embeds=F.pad(prompt, (0, 0, 0, 32 - len(prompt)))[None],
        video=[Image.fromarray(frame) for frame in video],
        mask=[Image.fromarray(frame).convert("RGB") for frame in mask],
        reference_images=[Image.fromarray(image) for image in images],
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=make_noise((6, 8, 8), 5)[None],
        output_type="latent",
    ).frames[0]
    torch.testing.assert_close(latents, official, atol=1e-3, rtol=1e-3)


def test_shipped_files_are_small_and_official() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 12 * 2**20
    assert {"t2v", "vace", "google", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"} <= {
        p.name for p in WEIGHTS.iterdir()
    }
