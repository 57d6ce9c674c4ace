"""Several processes make the video that one makes: tokens shared, guidance on two halves, weights spread."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.denoise import denoise
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.layout import Layout, choose_layout
from mindspeed_mm.generation.loras import applied
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.parallel import SINGLE, ContextParallel
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.result import PromptEmbeds
from mindspeed_mm.generation.stored import read_latents
from mindspeed_mm.models.source import OpenedModel
from tests.support.errors import raises
from tests.support.lora_files import lora_matrices, write_lora
from tests.support.tiny import tiny_inputs, tiny_transformer, write_official

CPU = Accelerator.detect("cpu")
REQUEST = RequestConfig(
    height=48, width=80, num_frames=9, steps=3, guidance_scale=5.0
)  # 45 tokens: no multiple of 2


class FromModule:
    """A whole model as a source of weights, without files."""

    def __init__(self, module):
        self.state, self.path = module.state_dict(), Path("memory")

    def read(self, name):
        return self.state[name]


def latents_of(layout=None, shard=False, experts=1, loras=(), quantize=None):
    """Latents of one video; called on every process."""
    parallel = SINGLE if layout is None else ContextParallel(Layout(*layout), CPU)
    models = [tiny_transformer(seed) for seed in range(experts)]
    if shard:
        opened = [OpenedModel(FromModule(model), model.config) for model in models]
        models = [parallel.load_sharded(each, torch.float32, quantize) for each in opened]
    elif layout is not None:
        for model in models:
            parallel.share_tokens(model)
    store = ModelStore(Experts(models, CPU, placed=shard), None, None, accelerator=CPU)
    inputs = tiny_inputs(3, frames=4, height=6, width=10)
    other = tiny_inputs(4, text=9)
    prompts = PromptEmbeds(
        prompt_embeds=inputs["prompt_embeds"][0], negative_prompt_embeds=other["prompt_embeds"][0]
    )
    sampling = resolve_sampling(
        REQUEST.model_copy(update={"guidance_scale_2": 2.0} if experts == 2 else {}), experts=experts
    )
    with applied(store.experts, loras) as hooks:
        return denoise(
            store,
            inputs["vace_context"][0],
            [prompts],
            sampling,
            guide=parallel.guide,
            hooks=hooks,
        )


@pytest.mark.parametrize(
    ("layout", "shard", "experts"),
    [
        ((2, 1), False, 1),
        ((1, 2), False, 1),
        ((2, 2), False, 2),
        ((4, 1), False, 1),
        ((2, 1), True, 1),
        ((2, 2), True, 2),
    ],
)
def test_latents_match_one_process(world, layout, shard, experts):
    alone = latents_of(experts=experts)
    together = world.run(layout[0] * layout[1], latents_of, layout, shard, experts)
    for latents in together:
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=0)
    assert float((together[0] - together[-1]).abs().max()) == 0


@pytest.mark.parametrize(("layout", "shard"), [((2, 1), False), ((2, 1), True)])
def test_loras_apply_equally_on_several_processes(world, tmp_path, layout, shard):
    shapes = tiny_transformer().state_dict()
    diffs = {
        f"{name}.diff": 0.1 * torch.ones_like(shapes[name])
        for name in ("blocks.0.modulation", "head.modulation")
    }
    save_file(diffs, tmp_path / "diffs.safetensors")
    loras = [
        LoraUse(path=str(write_lora("kohya", tmp_path, lora_matrices())), strength=(1, 0, 0.5)),
        LoraUse(path=str(tmp_path / "diffs.safetensors")),
    ]
    alone = latents_of(loras=loras)
    assert not torch.allclose(alone, latents_of(), atol=1e-2)
    for latents in world.run(2, latents_of, layout, shard, 1, loras):
        torch.testing.assert_close(latents, alone, atol=1e-4, rtol=0)


def test_weights_in_8_bits_are_spread_over_processes(world, tmp_path):
    loras = [LoraUse(path=str(write_lora("kohya", tmp_path, lora_matrices())))]
    together = world.run(2, latents_of, (2, 1), True, 1, loras, "fp8")
    torch.testing.assert_close(together[0], latents_of(loras=loras), atol=0.2, rtol=0)
    assert torch.equal(*together)


def generate(config):
    """The command's work on every process."""
    from mindspeed_mm.generation.loaders import inspect_experts
    from mindspeed_mm.tasks.generate_videos import work
    from mindspeed_mm.tasks.jobs.generate import GenerateJob

    job = GenerateJob.from_file(Path(config))
    work(job, job.videos, CPU, inspect_experts(job.model), ContextParallel(Layout(1, 2), CPU))


def test_command_on_two_ranks_writes_the_same_latents(world, tmp_path):
    write_official(tmp_path / "tiny")
    model = {"transformer": "tiny", "vae": "tiny", "text_encoder": "tiny"}
    request = {
        "prompt": "a red ball",
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "steps": 2,
        "dtype": "fp32",
    }
    found = {}
    for name, processes in (("one", 1), ("two", 2)):
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({"model": model, **request, "output_path": str(tmp_path / name)}))
        if processes == 1:
            from mindspeed_mm.tasks.generate import main

            main([str(config)])
        else:
            world.run(processes, generate, str(config))
        found[name] = read_latents(tmp_path / name / "video1" / "latents.safetensors")[0]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "job.json",
            "video1",
            "video1.json",
            "video1.mp4",
            "video1.png",
        ]
    torch.testing.assert_close(found["one"], found["two"], atol=1e-4, rtol=0)


def fail(folder):
    parallel = ContextParallel(Layout(2, 1), CPU)
    try:
        parallel.run_on_main_and_broadcast(lambda: (_ for _ in ()).throw(ConfigError("bad")))
    except ConfigError:
        return "said"
    except SystemExit as end:
        return end.code
    return "nothing"


def test_error_of_the_first_process_ends_all_once(world, tmp_path):
    assert world.run(2, fail, str(tmp_path)) == ["said", 1]


@pytest.mark.parametrize(
    ("world_size", "heads", "guided", "cfg", "context", "wanted"),
    [
        (1, 12, True, "auto", None, (1, 1)),
        (2, 12, True, "auto", None, (1, 2)),
        (8, 12, True, "auto", None, (4, 2)),
        (4, 12, False, "auto", None, (4, 1)),
        (3, 12, True, "auto", None, (3, 1)),
        (4, 40, True, "off", None, (4, 1)),
        (8, 40, True, "auto", 8, (8, 1)),
    ],
)
def test_processes_are_laid_out(world_size, heads, guided, cfg, context, wanted):
    assert choose_layout(world_size, heads, guided=guided, cfg_parallel=cfg, context=context) == Layout(
        *wanted
    )


@pytest.mark.parametrize(
    ("world_size", "cfg", "context"), [(5, "auto", None), (16, "on", None), (3, "on", None), (8, "on", 2)]
)
def test_layout_that_cannot_be_says_what_can(world_size, cfg, context):
    with raises(ConfigError, world_size):
        choose_layout(world_size, 12, guided=True, cfg_parallel=cfg, context=context)
