"""Frozen layers in 8 bits: which, how far the model is off with them, and how much memory they save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.load_model import build_on_meta, load_transformer
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.transforms.quantize import quantize_blocks
from mindspeed_mm.models.wan.config import PRESETS, VaceConfig, WanConfig
from mindspeed_mm.ops.quantized import quantized_layers
from mindspeed_mm.training.build import fill_parameters
from tests.distributed.jobs import FromModule
from tests.support.errors import raises
from tests.support.tiny import tiny_inputs, tiny_transformer

VACE = MODELS.get("vace")
WORLD = Path(__file__).resolve().parents[4] / "examples/vace/tiny/weights/vace"
ALL = QuantizeConfig()


def built(*configs: object, trainable: str = "branch") -> torch.nn.Module:
    """The tiny transformer with these transforms, filled as a training run fills it."""
    model = tiny_transformer(1)
    plan = plan_transforms(VACE, trainable, torch.float32, configs)
    for transform in plan:
        transform.apply(model)
    fill_parameters(model, FromModule(tiny_transformer()), 0, plan)
    return model


@pytest.mark.parametrize("order", [1, -1])
def test_lora_over_8_bits_trains_alone(order: int) -> None:
    model = built(*[ALL, LoraConfig(rank=4, on="both")][::order])
    held = quantized_layers(model)
    assert len(held) == 60
    assert not any("proj" in name or "embedding" in name or "head" in name for name in held)
    model(**tiny_inputs()).square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_branch_trains_on_a_trunk_in_8_bits() -> None:
    model = built(ALL)
    assert {name.split(".")[0] for name in quantized_layers(model)} == {"blocks"}
    model(**tiny_inputs()).square().mean().backward()
    assert all((p.grad is not None) == n.startswith("vace_") for n, p in model.named_parameters())


def test_names_of_the_weights_stay() -> None:
    names = [name for name, _ in tiny_transformer().named_parameters()]
    assert [name for name, _ in built(ALL).named_parameters()] == names
    few = built(QuantizeConfig(match="blocks.1.ffn.*", format="fp8"))
    assert sorted(quantized_layers(few)) == ["blocks.1.ffn.0.weight", "blocks.1.ffn.2.weight"]


@pytest.mark.parametrize(
    ("config", "trainable", "facts"),
    [
        (QuantizeConfig(match=("vace_blocks.*",)), "branch", ["vace_blocks.0.self_attn.q", "trains"]),
        (QuantizeConfig(match=("head.head",)), "branch", ["head.head"]),
        (QuantizeConfig(), "all", ["frozen"]),
    ],
)
def test_layers_unfit_for_8_bits_are_rejected(
    config: QuantizeConfig, trainable: str, facts: list[str]
) -> None:
    with raises(ConfigError, *facts):
        built(config, trainable=trainable)


@pytest.mark.parametrize(("form", "bound"), [("int8", 0.02), ("fp8", 0.05)])
def test_tiny_world_is_off_by_little(form: str, bound: float) -> None:
    """The velocity of trained weights: the shipped VACE of the tiny world, at four timesteps."""
    exact = load_transformer(WORLD, dtype=torch.float32)
    held = load_transformer(WORLD, dtype=torch.float32, quantize=form)
    assert len(quantized_layers(held)) == sum(n.endswith(".q.weight") for n in exact.state_dict()) // 2 * 10
    inputs = tiny_inputs(config=exact.config, text=7)
    for timestep in (950.0, 700.0, 400.0, 100.0):
        inputs["timestep"] = torch.tensor([timestep])
        with torch.no_grad():
            expected, found = exact(**inputs), held(**inputs)
        assert ((found - expected).norm() / expected.norm()).item() < bound, timestep


def test_nan_in_the_file_is_named(tmp_path: Path) -> None:
    weights = load_file(next(WORLD.glob("*.safetensors")))
    name = "blocks.0.ffn.0.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = float("nan")
    model = built(ALL)
    source = FromModule(tiny_transformer())
    source.state[name] = source.state[name].clone()
    source.state[name][0, 0] = float("nan")
    with raises(WeightsError, name, "NaN"):
        fill_parameters(model, source, 0)


def test_14b_trunk_takes_half_its_memory() -> None:
    """8 bits halve 28 GB to 14 GB, counted on the meta device."""
    trunk = PRESETS["Wan2.1-VACE-14B"].trunk
    assert isinstance(trunk, WanConfig)
    model = build_on_meta(VaceConfig(trunk=trunk, vace_layers=())).to(torch.bfloat16).requires_grad_(False)
    before = size(model)
    quantize_blocks(model, "int8")
    assert before / 1e9 == pytest.approx(28.6, abs=0.3)
    assert size(model) / 1e9 == pytest.approx(14.5, abs=0.3)


def size(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
