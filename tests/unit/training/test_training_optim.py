"""Weight decay, clipping, and whose AdamW."""

import sys
from types import ModuleType

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.training.config import OptimizerConfig
from mindspeed_mm.training.optim import build_optimizer, clip_gradients, param_groups, uses_weight_decay
from mindspeed_mm.training.step import update
from tests.support.errors import raises
from tests.support.tiny import tiny_transformer


def names_in(model: torch.nn.Module, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_matrices_decay_and_biases_norms_and_modulation_do_not():
    model = tiny_transformer()
    decayed, rest = param_groups(model, OptimizerConfig(lr=1.0, weight_decay=0.1))
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    spared = names_in(model, rest)
    assert {
        "blocks.0.modulation",
        "head.modulation",
        "blocks.0.norm3.weight",
        "blocks.0.self_attn.norm_q.weight",
    } <= spared
    assert {name for name, p in model.named_parameters() if name.endswith("bias") or p.ndim == 1} <= spared
    assert {
        "blocks.0.self_attn.q.weight",
        "patch_embedding.weight",
        "vace_blocks.0.after_proj.weight",
    } <= names_in(model, decayed)
    assert len(spared) + len(names_in(model, decayed)) == len(list(model.named_parameters()))


def test_weight_decay_all_decays_everything():
    (only,) = param_groups(tiny_transformer(), OptimizerConfig(lr=1.0, weight_decay_all=True))
    assert len(only["params"]) == len(list(tiny_transformer().parameters()))


def test_rule_looks_through_wrappers():
    assert uses_weight_decay("vace_blocks.0._checkpoint_wrapped_module.ffn.0.weight", torch.zeros(2, 2))
    assert not uses_weight_decay("vace_blocks.0._checkpoint_wrapped_module.modulation", torch.zeros(1, 6, 2))


def test_frozen_weights_are_not_in_the_optimizer():
    model = tiny_transformer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vace"))
    held = {id(p) for group in param_groups(model, OptimizerConfig(lr=1.0)) for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name.startswith("vace")}


def test_nothing_to_train_is_an_error():
    model = tiny_transformer().requires_grad_(False)
    with raises(ConfigError, where="predictor.trainable"):
        param_groups(model, OptimizerConfig(lr=1.0))


def test_update_equals_torchs_adamw():
    ours, theirs = tiny_transformer(), tiny_transformer()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, adam_beta2=0.95, adam_eps=1e-5, weight_decay_all=True)
    optimizers = [
        build_optimizer(ours, config),
        torch.optim.AdamW(
            theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, foreach=False
        ),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_clipping_matches_megatron():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip_gradients(parameters, 1.0) == pytest.approx(28**0.5)
    torch.testing.assert_close(parameters[0].grad, torch.full((3,), 2.0 / (28**0.5 + 1e-6)))


def test_small_gradient_and_zero_clip_change_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for limit in (10.0, 0.0):
        parameter.grad = torch.ones(2)
        clip_gradients([parameter], limit)
        assert parameter.grad.tolist() == [1, 1]


def test_gradient_that_is_not_finite_is_measured_and_left():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, float("inf")])
    assert clip_gradients([parameter], 1.0) == float("inf")


class ApexLike(torch.optim.AdamW):
    """As apex.optimizers.FusedAdam is called: AdamW by adam_w_mode, and zero_grad() without arguments."""

    def __init__(self, params, adam_w_mode=True, **settings):
        assert adam_w_mode, "else decay goes into the gradient"
        super().__init__(params, **settings)

    def zero_grad(self):
        super().zero_grad(set_to_none=True)


class NpuLike(torch.optim.AdamW):
    """As torch_npu.optim.NpuFusedAdamW is called.

    Gradients are views of one buffer, so they cannot become None.
    """

    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        super().zero_grad(set_to_none=False)


@pytest.mark.parametrize(
    ("selection", "module", "name", "stand_in"),
    [
        ("apex", "apex.optimizers", "FusedAdam", ApexLike),
        ("npu", "torch_npu.optim", "NpuFusedAdamW", NpuLike),
        ("fused_adamw", "torch_npu.optim", "NpuFusedAdamW", NpuLike),
    ],
)
def test_optimizer_of_another_package_steps_as_torchs_does(monkeypatch, selection, module, name, stand_in):
    package = ModuleType(module)
    setattr(package, name, stand_in)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, package)
    ended = []
    for chosen in (selection, "torch"):
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.copy_(torch.arange(6.0).view(2, 3))
            model.bias.zero_()
        optimizer = build_optimizer(
            model, OptimizerConfig(lr=0.1, weight_decay=0.5, optimizer_selection=chosen)
        )
        assert isinstance(optimizer, stand_in) == (chosen == selection)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            _, stepped = update(model, optimizer, 1.0, 1.0)
            assert stepped
        ended.append(model.weight.detach())
    assert torch.equal(*ended)


@pytest.mark.parametrize("selection", ["apex", "npu"])
def test_optimizer_that_is_not_installed_says_so(selection):
    with raises(ConfigError, "--optimizer-selection", selection, "fused_torch_adamw"):
        build_optimizer(tiny_transformer(), OptimizerConfig(lr=1.0, optimizer_selection=selection))
