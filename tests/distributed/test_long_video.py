"""Long videos on two processes equal those of one process: one shared or one each, and resumed."""

import json
from pathlib import Path

import pytest
import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.generation.layout import Layout
from mindspeed_mm.generation.loaders import inspect_experts
from mindspeed_mm.generation.parallel import SINGLE, ContextParallel, DataParallel
from mindspeed_mm.generation.stored import read_latents
from mindspeed_mm.log import rank, world_size
from mindspeed_mm.tasks.generate_videos import work
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.tiny import write_official

FILES = ("grown/window_00", "grown/window_01", "blended")


def generate(config, layout=None):
    """The command's work on every process; without a layout, each makes its own videos."""
    job = GenerateJob.from_file(Path(config))
    if layout is not None:
        parallel, videos = ContextParallel(Layout(*layout), Accelerator.detect("cpu")), job.videos
    else:
        alone = world_size() == 1
        parallel, videos = SINGLE if alone else DataParallel(), job.videos[rank() :: world_size()]
    work(job, videos, Accelerator.detect("cpu"), inspect_experts(job.model), parallel)


def made(folder):
    return [read_latents(folder / name / "latents.safetensors")[0] for name in FILES]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A function that writes the inference JSON of a run, and the latents that one process makes."""
    folder = tmp_path_factory.mktemp("long")
    write_official(folder / "tiny")

    def write(name):
        request = {
            "model": {"transformer": "tiny", "vae": "tiny", "text_encoder": "tiny"},
            "prompt": "a red ball",
            **{"height": 32, "width": 48, "num_frames": 13, "window": 9, "window_overlap": 5},
            **{"steps": 2, "dtype": "fp32", "output_path": str(folder / name)},
            "tasks": [{"name": "grown"}, {"name": "blended", "window_mode": "context_windows"}],
        }
        (folder / f"{name}.json").write_text(json.dumps(request))
        return str(folder / f"{name}.json"), folder / name

    config, one = write("one")
    generate(config)
    return write, made(one)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tokens", "guidance"])
def test_processes_share_a_long_video_and_resume_it(world, places, layout):
    write, alone = places
    config, folder = write(f"shared_{layout[0]}")
    world.run(2, generate, config, layout)
    for found, wanted in zip(made(folder), alone, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    kept = (folder / FILES[0] / "latents.safetensors").stat().st_mtime_ns
    first = made(folder)
    (folder / FILES[1] / "latents.safetensors").unlink()
    world.run(2, generate, config, layout)
    assert (folder / FILES[0] / "latents.safetensors").stat().st_mtime_ns == kept
    assert all(torch.equal(again, before) for again, before in zip(made(folder), first, strict=True))


def test_processes_make_their_own_long_videos(world, places):
    write, alone = places
    config, folder = write("own")
    world.run(2, generate, config)
    assert all(torch.equal(found, wanted) for found, wanted in zip(made(folder), alone, strict=True))
    windows = json.loads((folder / "grown.json").read_text())["windows"]
    assert [row["shared"] for row in windows["windows"]] == [0, 5]
