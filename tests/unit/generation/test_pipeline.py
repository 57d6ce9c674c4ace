"""The pipeline as a Python user meets it, on tiny models."""

import json
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import ConfigError, DataError, WeightsError
from mindspeed_mm.generation import pipeline as pipeline_module
from mindspeed_mm.generation import run as run_module
from mindspeed_mm.generation.config import RequestConfig, WeightPaths
from mindspeed_mm.generation.denoise import denoise
from mindspeed_mm.generation.experts import Experts, OffloadedModule
from mindspeed_mm.generation.loaders import load_text_encoder, resolve_model_dir
from mindspeed_mm.generation.models import ModelStore, vae_bytes
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import GenerationRequest, Inputs
from mindspeed_mm.generation.result import PromptEmbeds
from mindspeed_mm.generation.stages import decode
from mindspeed_mm.models.wan.config import PRESETS
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.models.wan.vae import WanVae
from tests.support.errors import names, raises
from tests.support.tiny import TINY, tiny_transformer, tiny_umt5, tiny_vae, write_official, write_tokenizer

pytestmark = pytest.mark.medium

CPU = Accelerator.detect("cpu")
SMALL = {"height": 32, "width": 48, "num_frames": 5, "steps": 2}
RNG = np.random.default_rng(0)
CLIP = RNG.integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
ROWS = torch.randn(7, TINY.trunk.text_dim, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(16, 1, 34, 34, generator=torch.Generator().manual_seed(2))
IMAGE = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def vae():
    return WanVae(tiny_vae(), "tiny")


def pipeline(vae, offload="none", experts=1, models=None):
    models = models or [tiny_transformer(seed) for seed in range(experts)]
    store = ModelStore(Experts(models, CPU, offload), vae, None, accelerator=CPU)
    store.cached_prompts.update({"a": ROWS, "b": ROWS[:4].flip(0)})
    return VacePipeline(store)


def latents(pipe, **values):
    return pipe("a", negative_prompt="b", src_video=CLIP, src_ref_images=IMAGE, **{**SMALL, **values}).latents


def test_from_pretrained_reads_a_folder_and_saves(tmp_path):
    write_official(tmp_path / "tiny")
    pipe = VacePipeline.from_pretrained(tmp_path / "tiny", dtype=torch.float32, device="cpu")
    result = pipe("a red ball", src_video=CLIP, **SMALL)
    assert result.frames.shape == (5, 32, 48, 3)
    result.save(tmp_path / "out" / "ball.mp4")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ball",
        "ball.json",
        "ball.mp4",
        "ball.png",
    ]
    assert result.settings["sampling"]["seed"] == 2025
    assert {"text", "load", "vae_encode", "denoise", "vae_decode", "step"} <= result.settings[
        "seconds"
    ].keys()


def test_slow_bf16_is_named_when_weights_open(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Accelerator, "hint_slow_bf16", lambda self, used, advice: said.append((used, advice)))
    weights = write_official(tmp_path / "tiny")
    for dtype in (torch.bfloat16, torch.float32):
        VacePipeline.from_pretrained(weights, dtype=dtype, device="cpu")
    assert said == [(True, "pass dtype=torch.float32"), (False, "pass dtype=torch.float32")]


def test_call_far_from_the_training_sizes_is_named(vae, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mindspeed_mm"), "propagate", True)
    pipe = pipeline(vae)
    pipe.config = PRESETS["Wan2.1-VACE-1.3B"]
    latents(pipe, steps=1)
    said = dict.fromkeys(caplog.messages)  # a logger of another test may hand each to two handlers
    size, frames = said
    assert names(size, "32x48", "far")
    assert names(frames, "5 frames", "far")


def test_text_encoder_is_freed_before_denoising(tmp_path, monkeypatch):
    write_official(tmp_path / "tiny")
    born = []

    def load(*arguments):
        encoder = load_text_encoder(*arguments)
        born.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(pipeline_module, "load_text_encoder", load)
    pipe = VacePipeline.from_pretrained(tmp_path / "tiny", dtype=torch.float32, device="cpu")
    alive = []
    pipe("a red ball", on_step=lambda *_: alive.append(born[0]()), **SMALL)
    assert alive == [None] * SMALL["steps"]
    pipe("a red ball", **SMALL)  # and a prompt that is known needs none
    assert len(born) == 1


def test_folder_of_diffusers_makes_the_same_video(tmp_path):
    write_official(tmp_path / "official", dtype=torch.float32)
    root, names = tmp_path / "diffusers", KEY_MAPS["diffusers"]
    models = [tiny_transformer(seed) for seed in (0, 1)]
    config = {"num_attention_heads": 4, "attention_head_dim": 12, "vace_layers": [0, 2], "text_len": 16}
    for folder, model in zip(("transformer", "transformer_2"), models, strict=True):
        (root / folder).mkdir(parents=True)
        state = {names.to_theirs(name): weight.contiguous() for name, weight in model.state_dict().items()}
        save_file(state, root / folder / "diffusion_pytorch_model.safetensors")
        (root / folder / "config.json").write_text(json.dumps(config))
    tiny_vae().save_pretrained(root / "vae")
    tiny_umt5().bfloat16().save_pretrained(root / "text_encoder")
    write_tokenizer(root / "tokenizer")
    found = resolve_model_dir(root)
    assert [Path(path).name for path in found.transformer] == ["transformer", "transformer_2"]
    one = found.model_copy(update={"transformer": found.transformer[:1]})
    made = [
        VacePipeline.from_pretrained(weights, dtype=torch.float32, device="cpu")(
            "a red ball", negative_prompt="", src_video=CLIP, **SMALL
        )
        for weights in (tmp_path / "official", one)
    ]
    assert torch.equal(made[0].latents, made[1].latents)
    assert np.array_equal(made[0].frames, made[1].frames)


def test_folder_without_weights_is_named(tmp_path):
    with raises(WeightsError, "diffusion_pytorch_model"):
        VacePipeline.from_pretrained(tmp_path, device="cpu")


def test_inference_json_names_the_weights(tmp_path):
    model = {"transformer": ["t"], "vae": "v", "text_encoder": "e", "tokenizer": "k"}
    (tmp_path / "a.json").write_text(json.dumps({"model": model, "prompt": "unread", "steps": 3}))
    assert resolve_model_dir(tmp_path / "a.json") == WeightPaths(**model)
    (tmp_path / "b.json").write_text(json.dumps({"model": {**model, "vea": "v"}}))
    with raises(ConfigError, "b.json:model.vea", "'vae'"):
        resolve_model_dir(tmp_path / "b.json")


@pytest.mark.parametrize("offload", ["model", "block"])
@pytest.mark.parametrize("experts", [1, 2])
def test_offload_changes_nothing(vae, offload, experts):
    plain = latents(pipeline(vae, experts=experts))
    pipe = pipeline(vae, offload, experts)
    assert torch.equal(latents(pipe), plain)
    assert torch.equal(latents(pipe), plain)  # and again, after the weights went home


def test_blocks_are_loaded_in_the_order_in_which_they_run():
    model, seen = tiny_transformer(), []
    for block in model.blocks_in_order():
        block.register_forward_hook(lambda module, *_: seen.append(module))
    from tests.support.tiny import tiny_inputs

    model(**tiny_inputs())
    assert seen == model.blocks_in_order()


def test_pipeline_takes_a_request_and_nothing_else(vae):
    sampling = resolve_sampling(RequestConfig(**SMALL), experts=1)
    inputs = Inputs(src_video=CLIP, src_ref_images=[IMAGE])
    request = GenerationRequest(prompt="a", negative_prompt="b", inputs=inputs, sampling=sampling)
    pipe = pipeline(vae)
    assert torch.equal(pipe(request).latents, latents(pipe))
    with raises(ConfigError, "seed", "src_ref_images", where="VacePipeline"):
        pipe(request, seed=1, src_ref_images=[IMAGE])


@pytest.mark.parametrize(("module", "stage"), [(run_module, "denoise"), (run_module, "decode")])
def test_out_of_memory_in_a_call_says_what_helps(vae, monkeypatch, module, stage):
    full = torch.OutOfMemoryError("CUDA out of memory")

    def small(*_, **__):
        raise full

    monkeypatch.setattr(module, stage, small)
    with raises(DataError, "memory") as caught:
        latents(pipeline(vae))
    assert caught.value.fix
    assert caught.value.__cause__ is full


def test_one_seed_is_one_video(vae):
    first, again, other = (latents(pipeline(vae), seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_of_a_seed_never_changes():
    noise = make_noise((1, 1, 1), 2025)
    expected = torch.randn(
        1, 16, 1, 1, 1, generator=torch.Generator("cpu").manual_seed(2025), dtype=torch.float32
    )[0]
    assert torch.equal(noise, expected)


def test_references_are_dropped_before_decoding(vae):
    pipe = pipeline(vae)
    result = pipe("a", negative_prompt="b", src_ref_images=[IMAGE, IMAGE], **SMALL)
    assert result.latents.shape == (16, 2 + 2, 4, 6)
    alone = np.concatenate(list(decode(pipe.models, result.latents[:, 2:])))
    assert np.array_equal(result.frames, alone)


def test_guidance_of_one_does_not_ask_about_the_negative_prompt(vae):
    asked = []
    model = tiny_transformer()
    model.register_forward_pre_hook(lambda _, args: asked.append(len(args[2])))
    latents(pipeline(vae, models=[model]), guidance_scale=1.0)
    assert asked == [1] * SMALL["steps"]
    latents(pipeline(vae, models=[model]), guidance_scale=2.0)
    assert asked[SMALL["steps"] :] == [2] * SMALL["steps"]  # both prompts in one pass


@pytest.mark.parametrize("offload", ["none", "model", "block"])
def test_prompts_run_in_sequence_when_memory_is_short(vae, offload, monkeypatch):
    together = latents(pipeline(vae, offload))
    pipe, asked = pipeline(vae, offload), []
    pipe.models.experts.models[0].register_forward_pre_hook(lambda _, args: asked.append(len(args[2])))
    weights = sum(weight.nbytes for weight in pipe.models.experts.models[0].parameters())
    monkeypatch.setattr(Accelerator, "total_memory", lambda _: weights)
    torch.testing.assert_close(latents(pipe), together, atol=1e-5, rtol=0)
    assert asked == [1, 1] * SMALL["steps"]


def test_only_the_active_expert_is_on_the_device(monkeypatch):
    models = [tiny_transformer(seed) for seed in (0, 1)]
    here = set()

    def owner(module):
        weight = module._host[0][0]
        return next(n for n, model in enumerate(models) if any(weight is own for own in model.parameters()))

    monkeypatch.setattr(OffloadedModule, "onload", lambda self: here.add(owner(self)))
    monkeypatch.setattr(OffloadedModule, "offload", lambda self: here.discard(owner(self)))
    small = SimpleNamespace(kind="cuda", device=torch.device("cpu"), total_memory=lambda: 1 << 30)
    experts, sampling = Experts(models, small), resolve_sampling(RequestConfig(), experts=2)
    assert experts.mode == "model"
    assert here == set()
    for timestep, active in ((999.0, 0), (875.0, 0), (874.0, 1), (100.0, 1)):
        assert experts.at(timestep, sampling)[0] is models[active]
        assert here == {active}
    experts.offload()
    assert here == set()
    roomy = SimpleNamespace(kind="cuda", device=torch.device("cpu"), total_memory=lambda: 64 << 30)
    assert Experts(models, roomy).mode == "none"
    assert here == {0, 1}


class Cancelled(Exception):
    pass


def test_hooks_see_each_step_and_may_end_the_video(vae):
    pipe, seen = pipeline(vae, "model"), []

    def cancel(step):
        seen.append((step.index, step.total, step.latents.shape, step.timestep))
        if step.index == 1:
            raise Cancelled

    sampling = resolve_sampling(RequestConfig(**{**SMALL, "steps": 3}), experts=1)
    context = torch.zeros(96, 2, 4, 6)
    with pytest.raises(Cancelled):
        denoise(
            pipe.models,
            context,
            [PromptEmbeds(prompt_embeds=ROWS, negative_prompt_embeds=None)],
            sampling,
            hooks=[cancel],
        )
    assert [step[:3] for step in seen] == [(index, 3, (1, 16, 2, 4, 6)) for index in range(2)]
    assert seen[0][3] > seen[1][3]
    assert pipe.models.experts._active is None  # off the device all the same


def test_context_scale_of_zero_is_the_trunk_alone(vae):
    branchless = []
    model = tiny_transformer()
    model.vace_blocks[0].register_forward_hook(lambda *_: branchless.append(1))
    without = latents(pipeline(vae, models=[model]), context_scale=0.0)
    assert not branchless
    nearly = latents(pipeline(vae, models=[model]), context_scale=(0.0, 1e-12))
    assert branchless
    torch.testing.assert_close(without, nearly, atol=1e-5, rtol=0)


def test_only_the_active_expert_predicts(vae):
    models, asked = [tiny_transformer(seed) for seed in (0, 1)], []
    for number, model in enumerate(models):
        model.register_forward_pre_hook(lambda *_, number=number: asked.append(number))
    latents(pipeline(vae, models=models), steps=6, guidance_scale=1.0)
    assert asked == sorted(asked)
    assert set(asked) == {0, 1}


def test_streamed_frames_match_the_whole_decode(vae):
    pipe = pipeline(vae)
    clip = torch.randn(16, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    chunks = list(decode(pipe.models, clip))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 4]
    whole = (vae.decode(clip[None])[0].permute(1, 2, 3, 0) + 1) * 127.5
    assert np.abs(np.concatenate(chunks).astype(float) - whole.numpy()).max() <= 0.5 + 1e-3


def test_tiles_are_chosen_by_need(vae):
    pipe = pipeline(vae)
    assert not pipe.models.needs_tiles(480, 832)
    assert pipe.models.needs_tiles(48000, 83200)


def test_vae_tiles_when_frames_do_not_fit(monkeypatch):
    vae, called = WanVae(tiny_vae(), "tiny"), []
    if not hasattr(vae.model, "use_tiling"):
        pytest.skip("this diffusers' VAE has no tiles")
    for name in ("tiled_encode", "tiled_decode"):
        work = getattr(vae.model, name)
        monkeypatch.setattr(
            vae.model,
            name,
            lambda *args, name=name, work=work, **more: called.append(name) or work(*args, **more),
        )
    size, frames = 272, {}  # a tile is 256 x 256
    for room in (2, 1):
        free = room * vae_bytes(vae, size, size)
        monkeypatch.setattr(
            Accelerator, "total_memory", lambda self, free=free: self.memory_allocated() + free
        )
        pipe = pipeline(vae)
        result = pipe("a", height=size, width=size, num_frames=1, steps=1, guidance_scale=1)
        assert result.settings["tiled"] == bool(called) == (room == 1)
        frames[room] = np.concatenate(list(decode(pipe.models, LATENTS)))
    assert {"tiled_encode", "tiled_decode"} == set(called)
    apart = np.abs(frames[1].astype(float) - frames[2])
    # a tile does not see what lies around it: of 255 levels some near its edges are far off, most are not
    assert 0 < apart.mean() < 4, apart.mean()


@pytest.mark.parametrize(
    ("values", "kind", "facts"),
    [
        ({"height": 40}, ConfigError, ("height", "multiple of 16")),
        ({"num_frames": 6}, ConfigError, ("num_frames", "4k+1")),
        ({"context_scale": (1.0, 1.0, 1.0)}, ConfigError, ("context_scale", "3 numbers", "2 branch")),
        ({"src_mask": CLIP[:3]}, DataError, ("src_mask",)),
    ],
)
def test_bad_request_is_one_line(vae, values, kind, facts):
    with raises(kind, *facts):
        latents(pipeline(vae), **values)
