"""LoRA layers: where they go, what they compute and what trains. The peft package is the oracle."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import LoraConfig, parse_transforms
from mindspeed_mm.models.transforms.lora import LoraLinear
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.training.build import fill_parameters
from tests.distributed.jobs import FromModule
from tests.support.errors import raises
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer

VACE = MODELS.get("vace")


def adapted(config: LoraConfig, *, trainable: str = "branch", seed: int = 0) -> torch.nn.Module:
    """A tiny transformer with this LoRA and the weights of `tiny_transformer()`; B is random, not zero."""
    base, model = tiny_transformer(), tiny_transformer(1)
    plan = plan_transforms(VACE, trainable, torch.float32, [config])
    for transform in plan:
        transform.apply(model)
    fill_parameters(model, FromModule(base), seed, plan)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def targets(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=2, on="both"),
        LoraConfig(rank=4, alpha=8, rslora=True, on="branch", modules_to_save=("vace_patch_embedding",)),
        LoraConfig(rank=2, on="trunk", match=("self_attn.*", "ffn.2")),
    ],
    ids=["both", "rslora-and-saved", "trunk"],
)
def test_lora_equals_peft(config: LoraConfig) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    model = adapted(config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        use_rslora=config.rslora,
        target_modules=sorted(targets(model)),
        modules_to_save=list(config.modules_to_save) or None,
    )
    oracle = peft.inject_adapter_in_model(settings, tiny_transformer())
    weights = dict(model.named_parameters())
    names = {}
    for name, parameter in oracle.named_parameters():
        ours = name.replace(".default.", ".").replace(".base_layer.", ".")
        ours = ours.replace(".original_module.", ".").replace(".modules_to_save.", ".")
        parameter.data.copy_(weights[ours])
        if parameter.requires_grad:
            names[ours] = parameter
    inputs = tiny_inputs()
    found, expected = model(**inputs), oracle(**inputs)
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found, tiny_transformer()(**inputs), atol=1e-3)
    for out in (found, expected):
        (out.square().mean()).backward()
    assert {name for name, p in weights.items() if p.requires_grad} == names.keys()
    for name, parameter in names.items():
        assert torch.allclose(weights[name].grad, parameter.grad, atol=1e-6, rtol=1e-5), name


def test_lora_starts_from_the_base_model() -> None:
    model = tiny_transformer(1)
    plan = plan_transforms(VACE, "branch", torch.float32, [LoraConfig(rank=4, dropout=0.5)])
    for transform in plan:
        transform.apply(model)
    fill_parameters(model, FromModule(tiny_transformer()), 0, plan)
    inputs = tiny_inputs()
    assert torch.equal(model.train()(**inputs), tiny_transformer()(**inputs))


def test_lora_matrices_train_in_fp32_and_the_base_is_frozen() -> None:
    model = tiny_transformer()
    config = LoraConfig(rank=4, modules_to_save=("vace_patch_embedding", "after_proj"))
    for transform in plan_transforms(VACE, "branch", torch.bfloat16, [config]):
        transform.apply(model)
    for name, parameter in model.named_parameters():
        whole = name.startswith("vace_patch_embedding.") or ".after_proj." in name
        assert parameter.requires_grad == (whole or ".lora_" in name), name
        exact = parameter.requires_grad or name.startswith(VACE.fp32_modules)
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name


@pytest.mark.parametrize(
    ("trainable", "on", "parts"),
    [
        ("branch", None, {"vace_blocks"}),
        ("trunk", None, {"blocks"}),
        ("all", None, {"blocks", "vace_blocks"}),
        ("branch", "trunk", {"blocks"}),
        ("branch", "both", {"blocks", "vace_blocks"}),
    ],
)
def test_lora_adapts_the_part_that_is_set(trainable: str, on: str | None, parts: set[str]) -> None:
    found = targets(adapted(LoraConfig(rank=1, on=on), trainable=trainable))
    assert {name.split(".")[0] for name in found} == parts
    per_block = 10  # q, k, v, o of two attentions and two ffn layers
    counts = {"blocks": TINY.trunk.num_layers, "vace_blocks": len(TINY.vace_layers)}
    assert len(found) == per_block * sum(counts[part] for part in parts)


def test_lora_merged_computes_the_same() -> None:
    config = LoraConfig(rank=4, alpha=8, on="both")
    model = adapted(config)
    inputs = tiny_inputs()
    before = model(**inputs)
    plan_transforms(VACE, "branch", torch.float32, [config])[0].merge(model)
    assert torch.allclose(model(**inputs), before, atol=2e-6)
    assert all(module.scale == 0 for module in model.modules() if isinstance(module, LoraLinear))


def test_lora_starting_matrices_depend_on_seed_and_name() -> None:
    lora = plan_transforms(VACE, "branch", torch.float32, [LoraConfig(rank=4)])[0]
    shape = torch.Size([4, 9])
    first = lora.initial_weight("blocks.0.ffn.0.lora_A.weight", shape, 1)
    assert torch.equal(first, lora.initial_weight("blocks.0.ffn.0.lora_A.weight", shape, 1))
    assert not torch.equal(first, lora.initial_weight("blocks.0.ffn.0.lora_A.weight", shape, 2))
    assert not torch.equal(first, lora.initial_weight("blocks.1.ffn.0.lora_A.weight", shape, 1))
    assert first.abs().max() <= 1 / 3
    assert not lora.initial_weight("blocks.0.ffn.0.lora_B.weight", shape, 1).any()


@pytest.mark.medium
def test_block_with_a_lora_compiles_into_one_graph() -> None:
    model, inputs = adapted(LoraConfig(rank=4, on="both")), tiny_inputs()
    expected = model(**inputs)
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.vace_blocks[1].compile(backend="aot_eager", fullgraph=True)
    compiled = model(**inputs)
    compiled.square().mean().backward()
    torch.testing.assert_close(compiled, expected, atol=5e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=5e-6, rtol=1e-4)


def test_lora_dropout_acts_in_training_only() -> None:
    model = adapted(LoraConfig(rank=4, dropout=0.5))
    inputs = tiny_inputs()
    assert not torch.equal(model.train()(**inputs), model(**inputs))
    assert torch.equal(model.eval()(**inputs), model(**inputs))


def test_pattern_without_a_layer_is_rejected() -> None:
    with raises(ConfigError, "self_attn.qq", where="transforms: lora.match"):
        adapted(LoraConfig(rank=1, match=("self_attn.qq",)))
    with raises(ConfigError, "vace_patch", where="transforms: lora.modules_to_save"):
        adapted(LoraConfig(rank=1, modules_to_save=("vace_patch",)))
    with raises(ConfigError, "trunk", where="transforms: lora.on"):
        adapted(LoraConfig(rank=1, match=("after_proj",), on="trunk"))


@pytest.mark.parametrize(
    ("values", "facts", "where"),
    [
        ({"type": "lora"}, ["object"], "model.json:transforms"),
        ([{"rank": 4}], ["type", "lora"], "model.json:transforms[0]"),
        (["lora"], ["a string"], "model.json:transforms[0]"),
        ([{"type": "lora"}, {"type": "lore"}], ["lore", "lora"], "model.json:transforms[1].type"),
        ([{"type": "lora", "ranks": 4}], ["ranks", "rank"], None),
        ([{"type": "lora", "alpha": 0}], ["alpha", 0], None),
    ],
)
def test_bad_transforms_are_rejected(values: object, facts: list[object], where: str | None) -> None:
    with raises(ConfigError, *facts, where=where):
        parse_transforms(values, "model.json:transforms")
