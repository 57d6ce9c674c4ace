"""Generation gives the bits that it gave before.

Calls, the command and validation videos against stored latents.

Another CPU or torch may round differently; there the latents agree within a tolerance. After an intended
change of numbers, store them again: `python -m tests.unit.generation.test_stored_latents`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.stored import read_latents
from mindspeed_mm.tasks.generate import main
from mindspeed_mm.tasks.validation_videos import ValidationVideos
from tests.support.tiny import tiny_transformer, write_official, write_transformer

pytestmark = pytest.mark.medium

STORED = Path(__file__).with_name("stored_latents.safetensors")
SIZE = {"height": 32, "width": 48, "num_frames": 5, "steps": 4}
RNG = np.random.default_rng(11)
CLIP = RNG.integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
IMAGES = [RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(2)]
MASK = np.zeros((5, 32, 48), np.uint8)
MASK[:, 8:24, 16:40] = 255
EDIT = {"src_video": CLIP, "src_mask": MASK, "src_ref_images": IMAGES}

# name → what `pipe(...)` is called with; the prefix "two" is for [high, low]
CALLS = {
    "plain": {"guidance_scale": 1.0},
    "guided": {},
    "control": {"src_video": CLIP, "seed": 7},
    "edit": EDIT,
    "edit_soft": {**EDIT, "soft_mask": True, "context_scale": (0.5, 1.5)},
    "no_branch": {"src_video": CLIP, "context_scale": 0.0},
    "outpaint": {"src_video": CLIP, "outpaint": (0.5, 0.0, 0.5, 0.0)},
    "first_last": {"first_frame": Image.fromarray(CLIP[0]), "last_frame": Image.fromarray(CLIP[-1])},
    "dpm++": {"solver": "dpm++", "src_video": CLIP},
    "mindspeed": {"preset": "mindspeed", "src_video": CLIP, "src_ref_images": IMAGES[0]},
    "diffusers": {"preset": "diffusers", "src_video": CLIP},
    "given_noise": {"noise": torch.randn(16, 2, 4, 6, generator=torch.Generator().manual_seed(5))},
    "two_switching": {**EDIT, "steps": 6, "guidance_scale_2": 2.0},
    "two_plain_low": {"steps": 6, "guidance_scale_2": 1.0},
}
OFFLOADS = ("none", "model", "block")
TASKS = [
    {"name": "text"},
    {
        "name": "edit",
        "video_path": "clip.mkv",
        "mask_path": "mask.png",
        "image_paths": ["0.png", "1.png"],
        "seed": 3,
    },
    {"name": "between", "first_frame_path": "0.png", "last_frame_path": "1.png", "guidance_scale": 1},
    {"name": "other", "prompt": "a blue cat walks", "preset": "mindspeed", "image_path": "0.png"},
]


def machine() -> dict[str, str]:
    """What decides the last bits of a sum."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "torch": torch.__version__,
        "cpu": (
            f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {' '.join(sorted(names))}"
        ).strip(),
    }


def write_world(folder: Path) -> None:
    """Weights of one model and of two experts, and every source that the tasks name."""
    write_official(folder / "one", dtype=torch.float32)
    write_official(folder / "two", dtype=torch.float32)
    (folder / "two" / "diffusion_pytorch_model.safetensors").unlink()
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        write_transformer(folder / "two" / name, tiny_transformer(seed), torch.float32)
    write_video(folder / "clip.mkv", CLIP, 16, lossless=True)
    Image.fromarray(MASK[0]).save(folder / "mask.png")
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{number}.png")
    config = {
        "model": {"transformer": ["one"], "vae": "one", "text_encoder": "one"},
        **{"prompt": "a red ball bounces", "negative_prompt": "a dog", "dtype": "fp32", **SIZE},
        "output_path": str(folder / "out"),
        "tasks": TASKS,
    }
    (folder / "inference.json").write_text(json.dumps(config))


def by_call(folder: Path, offload: str) -> dict[str, tuple[torch.Tensor, bytes]]:
    """Latents and pixels of each of CALLS."""
    made = {}
    pipes = {
        name: VacePipeline.from_pretrained(folder / name, dtype=torch.float32, device="cpu", offload=offload)
        for name in ("one", "two")
    }
    for name, values in CALLS.items():
        pipe = pipes["two" if name.startswith("two") else "one"]
        result = pipe("a red ball bounces", negative_prompt="a dog", **{**SIZE, **values})
        made[name] = (result.latents, result.frames.tobytes())
    return made


def by_command(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Latents of each of TASKS."""
    main([str(folder / "inference.json"), *flags])
    return files_of(folder / "out")


def by_validation(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Latents of each of TASKS at two evaluations of a model in training, with the command's weights."""
    model = tiny_transformer().train()
    mesh = SimpleNamespace(world_size=1, cp_size=1)
    videos = ValidationVideos(
        folder / "inference.json", model, mesh, Accelerator.detect("cpu"), folder / "validation"
    )
    for iteration in (1, 2):
        videos(iteration)
    return [files_of(folder / "validation" / f"iter_{iteration:07d}") for iteration in (1, 2)]


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    return {task["name"]: read_latents(folder / task["name"] / "latents.safetensors")[0] for task in TASKS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("stored")
    write_world(made)
    return made


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stored():
    with safe_open(STORED, "pt") as file:
        metadata = file.metadata()
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["pixels"]), metadata  # noqa: SIM118


def check(found: torch.Tensor, name: str, stored) -> bool:
    """Compare; whether this machine must give the same bits."""
    same_machine = {key: stored[2][key] for key in ("torch", "cpu")} == machine()
    if same_machine:
        assert torch.equal(found, stored[0][name]), name
    else:
        torch.testing.assert_close(
            found, stored[0][name], atol=1e-3, rtol=1e-3, msg=lambda text: f"{name}: {text}"
        )
    return same_machine


@pytest.mark.parametrize("offload", OFFLOADS)
def test_calls_give_the_stored_latents_and_pixels(folder, stored, offload):
    for name, (latents, pixels) in by_call(folder, offload).items():
        if check(latents, f"call {name}", stored):
            assert hashlib.sha256(pixels).hexdigest() == stored[1][name], name


@pytest.mark.parametrize("flags", [(), ("--offload", "block")])
def test_command_gives_the_stored_latents(folder, stored, flags):
    for name, latents in by_command(folder, *flags).items():
        check(latents, f"file {name}", stored)


def test_validation_videos_give_the_stored_latents(folder, stored):
    for made in by_validation(folder):
        for name, latents in made.items():
            check(latents, f"file {name}", stored)


def store() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_world(Path(name))
        calls = by_call(Path(name), "none")
        latents = {f"call {name}": found[0].contiguous() for name, found in calls.items()}
        latents |= {f"file {task}": found.contiguous() for task, found in by_command(Path(name)).items()}
    pixels = {name: hashlib.sha256(found[1]).hexdigest() for name, found in calls.items()}
    save_file(latents, STORED, metadata={**machine(), "pixels": json.dumps(pixels)})


if __name__ == "__main__":
    store()
