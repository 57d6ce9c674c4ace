"""LoRAs in generation: the video of the merged weights, and untouched weights afterwards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.config import LoraToConfig
from checkpoint.lora import write_comfyui, write_diffusers, write_peft
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.generation import loras as applying
from mindspeed_mm.generation.conditions import load_conditions
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.noise import make_noise, step_noise
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.request import Inputs
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.solver import Solver
from mindspeed_mm.generation.stages import encode_conditions
from mindspeed_mm.models.load_model import load_transformer
from mindspeed_mm.models.lora.adapter import merged
from mindspeed_mm.models.weights import open_adapter, open_weights
from tests.support.errors import raises
from tests.support.lora_files import DIALECTS, lora_matrices, write_lora
from tests.support.tiny import TINY, tiny_transformer, tiny_vae, write_transformer

pytestmark = pytest.mark.medium

CPU = Accelerator.detect("cpu")
SMALL = {"height": 32, "width": 32, "num_frames": 1, "steps": 2}
ROWS = torch.randn(7, TINY.trunk.text_dim, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vae():
    from mindspeed_mm.models.wan.vae import WanVae

    return WanVae(tiny_vae(), "tiny")


def pipeline(vae, *models, offload="none"):
    store = ModelStore(Experts(models, CPU, offload), vae, None, accelerator=CPU)
    store.cached_prompts.update({"a": ROWS, "b": ROWS[:4].flip(0)})
    return VacePipeline(store)


def latents(pipe, **values):
    return pipe("a", negative_prompt="b", **{**SMALL, **values}).latents


def merged_model(tmp_path, seed, *loras):
    folder = tmp_path / f"base-{seed}"
    write_transformer(folder, tiny_transformer(seed), torch.float32)
    base = open_weights(folder)
    found = merged(base, [(open_adapter(path, base.shapes), strength) for path, strength in loras])
    model = tiny_transformer(seed)
    model.load_state_dict({name: found.read(name) for name in found.tensors})
    return model.eval()


@pytest.mark.parametrize("merges", [True, False], ids=["merged", "added in every pass"])
def test_every_dialect_generates_the_same_latents(tmp_path, vae, merges, monkeypatch):
    monkeypatch.setattr(applying, "free_memory", lambda: (1 << 40) if merges else 0)
    pipe, matrices = pipeline(vae, tiny_transformer()), lora_matrices()
    expected = latents(pipe, loras=[str(write_lora("kohya", tmp_path, matrices))])
    written = [write_lora(dialect, tmp_path, matrices) for dialect in DIALECTS]
    base = tmp_path / "base"
    write_transformer(base, tiny_transformer(), torch.float32)
    for name, write in (
        ("folder", write_peft),
        ("a.safetensors", write_comfyui),
        ("b.safetensors", write_diffusers),
    ):
        cfg = {"source_path": str(written[0]), "target_path": str(tmp_path / name), "base_path": str(base)}
        write(LoraToConfig(**cfg))
        written.append(tmp_path / name)
    assert not torch.allclose(expected, latents(pipe), atol=1e-2)
    for path in written:
        torch.testing.assert_close(latents(pipe, loras=[str(path)]), expected, atol=1e-5, rtol=0)


def differences(path):
    """LightX2V files contain more than matrices: a norm, a bias, a modulation and a convolution."""
    shapes = {name: w.shape for name, w in tiny_transformer().state_dict().items()}
    generator = torch.Generator().manual_seed(8)
    names = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
        "vace_blocks.1.diff_m": "vace_blocks.1.modulation",
        "head.modulation.diff": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    save_file({key: 0.1 * torch.randn(shapes[n], generator=generator) for key, n in names.items()}, path)
    return path


@pytest.mark.parametrize("room", [0, 1 << 40], ids=["no room to merge", "room"])
@pytest.mark.parametrize("offload", ["none", "block"])
def test_loras_equal_the_merged_weights(tmp_path, vae, offload, room, monkeypatch):
    monkeypatch.setattr(applying, "free_memory", lambda: room)
    lora = write_lora("kohya", tmp_path, lora_matrices())
    more = differences(tmp_path / "more.safetensors")
    pipe = pipeline(vae, tiny_transformer(), offload=offload)
    before = latents(pipe)
    found = latents(pipe, loras=[{"path": str(lora), "strength": 0.7}, {"path": str(more), "strength": 2}])
    expected = latents(pipeline(vae, merged_model(tmp_path, 0, (lora, 0.7), (more, 2.0))))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(latents(pipe), before)
    assert torch.equal(latents(pipe, loras=[{"path": str(lora), "strength": 0}]), before)


def test_each_expert_gets_its_own_lora(tmp_path, vae):
    lora = write_lora("peft", tmp_path, lora_matrices())
    models = [tiny_transformer(1), tiny_transformer(2)]
    pipe = pipeline(vae, *models)
    for on, strengths in (("high", (1.0, 0.0)), ("low", (0.0, 1.0)), ("both", (1.0, 1.0))):
        expected = [
            merged_model(tmp_path / on, seed, (lora, s)) for seed, s in zip((1, 2), strengths, strict=True)
        ]
        found = latents(pipe, steps=4, loras=[{"path": str(lora), "on": on}])
        assert torch.equal(found, latents(pipeline(vae, *expected), steps=4)), on


def test_strength_for_each_step(tmp_path, vae):
    lora = write_lora("comfyui", tmp_path, lora_matrices())
    pipe = pipeline(vae, tiny_transformer())
    steps = {"solver": "euler", "steps": 2}
    first = latents(pipe, **steps, loras=[{"path": str(lora), "strength": [1, 0]}])
    both = latents(pipe, **steps, loras=[f"{lora}=1"])
    none = latents(pipe, **steps)
    one = latents(pipe, **steps, loras=[{"path": str(lora), "strength": [1, 1]}])
    assert torch.equal(both, one)
    assert not torch.equal(first, both)
    assert not torch.equal(first, none)
    with raises(ConfigError, "3", "2", where="loras[0].strength"):
        latents(pipe, **steps, loras=[{"path": str(lora), "strength": [1, 1, 1]}])


def test_lora_that_does_not_fit_leaves_the_models_alone(tmp_path, vae):
    pipe = pipeline(vae, tiny_transformer())
    before = latents(pipe)
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    with raises(WeightsError, "Flux", where=tmp_path / "flux.safetensors"):
        latents(pipe, loras=[str(tmp_path / "flux.safetensors")])
    with raises(ConfigError, "high", where="loras[0].on"):
        latents(pipe, loras=[{"path": str(write_lora("kohya", tmp_path, lora_matrices())), "on": "high"}])
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("lightx2v-4step", [1000, 937.5, 833.3333, 625]),
        ("lightx2v-8step", [1000, 972.2222, 937.5, 892.8571, 833.3333, 750, 625, 416.6667]),
        ("causvid", [999, 934, 862, 756, 603, 410, 250, 140, 74]),
        ("self-forcing", [1000, 900, 750, 500]),
        ("vace-3phase", [1000, 954.5455, 900, 833.3333, 750, 642.8571, 500, 300]),
    ],
)
def test_few_step_presets_have_their_timesteps(preset, expected):
    sampling = resolve_sampling(RequestConfig(preset=preset), experts=2)
    solver = Solver(sampling)
    assert solver.timesteps.tolist() == pytest.approx(expected, abs=1e-3)
    assert solver.sigmas.tolist() == pytest.approx([*(t / 1000 for t in expected), 0], abs=1e-6)
    assert sampling.steps == len(expected)
    assert sampling.needs_guidance == (preset == "vace-3phase")


def test_lightx2v_gives_each_expert_two_steps():
    sampling = resolve_sampling(RequestConfig(preset="lightx2v-4step"), experts=2)
    experts = Experts([tiny_transformer(1), tiny_transformer(2)], CPU)
    used = [experts.index_at(float(t), sampling.boundary) for t in Solver(sampling).timesteps]
    assert used == [0, 0, 1, 1]


def test_three_phases_have_their_experts_and_guidance():
    sampling = resolve_sampling(RequestConfig(preset="vace-3phase"), experts=2)
    experts = Experts([tiny_transformer(1), tiny_transformer(2)], CPU)
    found = [experts.at(float(t), sampling) for t in Solver(sampling).timesteps]
    assert [experts.models.index(model) for model, _ in found] == [0] * 4 + [1] * 4
    assert [scale for _, scale in found] == [3.5] + [1.0] * 7


def test_renoise_matches_the_formula():
    sampling = resolve_sampling(RequestConfig(preset="causvid", seed=5), experts=1)
    solver = Solver(sampling)
    generator = torch.Generator().manual_seed(0)
    sample = expected = torch.randn(1, 16, 1, 2, 2, generator=generator)
    sigmas = [t / 1000 for t in sampling.timesteps] + [0.0]
    for index in range(len(solver)):
        velocity = torch.randn(1, 16, 1, 2, 2, generator=generator)
        sample = solver.step(velocity, index, sample)
        clean = expected - sigmas[index] * velocity
        noise = step_noise(clean.shape, 5, index + 1)
        expected = sigmas[index + 1] * noise + (1 - sigmas[index + 1]) * clean
        torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0)
    assert torch.equal(step_noise((2, 3), 5, 1), step_noise((2, 3), 5, 1))
    assert not torch.equal(step_noise((2, 3), 5, 1), step_noise((2, 3), 5, 2))


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"preset": "causvid", "steps": 4}, ("4", "9", "causvid")),
        ({"timesteps": (900, 500), "solver": "unipc"}, ("euler", "renoise")),
    ],
)
def test_timesteps_that_contradict_other_keys_are_rejected(values, facts):
    with raises(ConfigError, *facts):
        resolve_sampling(RequestConfig(**values), experts=1)
    with pytest.raises(ValueError, match="must fall"):
        RequestConfig(timesteps=(500, 900))
    assert resolve_sampling(RequestConfig(timesteps=(900, 500)), experts=1).solver == "euler"


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_loras_apply_over_weights_in_8_bits(tmp_path, vae, form):
    lora = write_lora("kohya", tmp_path, lora_matrices())
    write_transformer(tmp_path / "base", tiny_transformer(), torch.float32)
    held = load_transformer(tmp_path / "base", dtype=torch.float32, quantize=form).requires_grad_(False)
    pipe = pipeline(vae, held, offload="block")
    before, found = latents(pipe), latents(pipe, loras=[str(lora)])
    exact = pipeline(vae, tiny_transformer())
    assert torch.allclose(before, latents(exact), atol=0.1)
    assert torch.allclose(found, latents(exact, loras=[str(lora)]), atol=0.1)
    assert not torch.allclose(found, before, atol=0.2)
    assert torch.equal(latents(pipe), before)


def test_merging_follows_memory_and_strengths(tmp_path, vae, monkeypatch):
    lora = write_lora("kohya", tmp_path, lora_matrices())
    model = tiny_transformer()
    experts, weight = Experts([model], CPU), model.blocks[0].self_attn.q.weight
    before = weight.data
    for room, strength, offload, merges in (
        (1 << 40, 1.0, "none", True),
        (0, 1.0, "none", False),
        (1 << 40, (1.0, 0.5), "none", False),
        (1 << 40, 1.0, "block", False),
    ):
        monkeypatch.setattr(applying, "free_memory", lambda room=room: room)
        experts.mode = offload
        with applying.applied(experts, [LoraUse(path=str(lora), strength=strength)]):
            assert torch.equal(weight.data, before) != merges
        assert weight.data is before or torch.equal(weight.data, before)


def test_strength_for_each_phase_matches_its_steps(tmp_path, vae):
    lora = str(write_lora("peft", tmp_path, lora_matrices()))
    pipe = pipeline(vae, tiny_transformer(1), tiny_transformer(2))
    preset = {"preset": "vace-3phase"}
    found = latents(pipe, **preset, steps=8, loras=[{"path": lora, "strength": "0;1;0.5"}])
    each = [0, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    expected = latents(pipe, **preset, steps=8, loras=[{"path": lora, "strength": each}])
    assert torch.equal(found, expected)
    last = latents(pipe, **preset, steps=8, loras=[f"{lora}=0;1"])
    assert torch.equal(
        last, latents(pipe, **preset, steps=8, loras=[{"path": lora, "strength": [0] + [1] * 7}])
    )


def test_strengths_of_the_command_line():
    assert LoraUse.model_validate("a.safetensors=1,1,0.5").strength == (1.0, 1.0, 0.5)
    assert LoraUse.model_validate("a.safetensors=0;1").strengths == (0.0, 1.0)
    assert LoraUse.model_validate("a=b.safetensors").path == "a=b.safetensors"
    with raises(ConfigError, 2, 1, where="loras[0].strength"):
        resolve_sampling(RequestConfig(loras=[LoraUse(path="a", strength="0;1")]), experts=1)
    with pytest.raises(ValueError, match="strength"):
        LoraUse(path="a", strength="0;x")


@torch.no_grad()
@pytest.mark.parametrize("preset", ["lightx2v-4step", "causvid"])
def test_few_steps_by_hand_are_the_pipelines_latents(tmp_path, vae, preset):
    """The published schedules written out: Euler and re-noise, around the merged model."""
    lora = write_lora("comfyui-alpha", tmp_path, lora_matrices())
    found = pipeline(vae, tiny_transformer())(
        "a", height=32, width=32, num_frames=5, preset=preset, seed=7, loras=[str(lora)]
    ).latents
    model = merged_model(tmp_path, 0, (lora, 1.0))
    levels = {
        "lightx2v-4step": [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25)],
        "causvid": [t / 1000 for t in (999, 934, 862, 756, 603, 410, 250, 140, 74)],
    }[preset]
    x = make_noise((2, 4, 4), 7)[None]
    gray = pipeline(vae, model)
    context = encode_conditions(
        gray.models, conditions_of_size(), SamplingConfig(height=32, width=32, num_frames=5)
    )
    for index, (sigma, after) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), start=1):
        v = model(x, torch.tensor([1000 * sigma]), ROWS[None], context[None])
        if preset == "causvid":
            clean = x - sigma * v
            x = after * step_noise(x.shape, 7, index) + (1 - after) * clean if after else clean
        else:
            x = x + (after - sigma) * v
    torch.testing.assert_close(found, x[0], atol=2e-4, rtol=0)


def conditions_of_size():
    return load_conditions(Inputs(), SamplingConfig(height=32, width=32, num_frames=5))
