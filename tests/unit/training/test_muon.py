"""Muon against the singular value decomposition and torch's own; what is no matrix against AdamW."""

from copy import deepcopy

import pytest
import torch

from mindspeed_mm.training.config import OptimizerConfig
from mindspeed_mm.training.muon import COEFFICIENTS, Muon, newton_schulz
from mindspeed_mm.training.optim import build_optimizer, param_groups
from mindspeed_mm.training.step import update
from tests.support.tiny import tiny_transformer
from tests.unit.training.test_training_optim import names_in


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_newton_schulz_keeps_singular_vectors(shape):
    matrices = drawn(3, *shape)
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert (values.abs() < 1.3).all()
    wanted = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(newton_schulz(matrices).double(), wanted, atol=1e-4, rtol=0)


def test_matrix_without_a_gradient_to_follow_stays():
    assert newton_schulz(torch.zeros(1, 3, 4)).tolist() == torch.zeros(1, 3, 4).tolist()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_three_updates_equal_torchs_muon(shape):
    ours, theirs = (torch.nn.Linear(*reversed(shape), bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, optimizer="muon")
    optimizers = [
        build_optimizer(ours, config),
        torch.optim.Muon(theirs.parameters(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for number in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.weight.grad = drawn(*shape, seed=number)
            optimizer.step()
    moved = (theirs.weight - before).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved, "torch's iteration is bf16"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_bf16_arithmetic_matches_torch():
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrices = drawn(2, 9, 4).bfloat16()
    for ours, matrix in zip(newton_schulz(matrices), matrices, strict=True):
        torch.testing.assert_close(ours, _zeropower_via_newtonschulz(matrix.clone(), COEFFICIENTS, 5, 1e-7))


def test_hidden_matrices_step_by_muon_and_the_rest_by_adamw():
    ours, theirs = tiny_transformer(), tiny_transformer()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, optimizer="muon", muon_momentum=0.9)
    hidden, *rest = param_groups(ours, config)
    chosen = names_in(ours, hidden)
    assert {
        "blocks.0.self_attn.q.weight",
        "blocks.1.ffn.2.weight",
        "vace_blocks.0.after_proj.weight",
        "time_projection.1.weight",
    } <= chosen
    assert not {name for name in chosen if "embedding" in name or name.startswith("head") or "norm" in name}
    assert (hidden["momentum"], hidden["weight_decay"]) == (0.9, 0.1)
    assert all("momentum" not in group for group in rest)
    optimizers = [
        build_optimizer(ours, config),
        build_optimizer(theirs, OptimizerConfig(lr=1e-2, weight_decay=0.1)),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = drawn(*parameter.shape, seed=number)
        _, stepped = update(model, optimizer, 1.0, 0.0)
        assert stepped
        assert all(parameter.grad is None for parameter in model.parameters())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in chosen), name


def test_update_is_about_as_large_as_adamws():
    linear = torch.nn.Linear(64, 96, bias=False)
    before = linear.weight.detach().clone()
    linear.weight.grad = drawn(96, 64)
    build_optimizer(linear, OptimizerConfig(lr=1.0, weight_decay=0.0, optimizer="muon")).step()
    assert (linear.weight - before).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_it_resumes_from_its_state():
    models = [torch.nn.Linear(5, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, OptimizerConfig(lr=0.1, optimizer="muon")) for model in models]

    def step(which: int, number: int) -> None:
        for parameter in models[which].parameters():
            parameter.grad = drawn(*parameter.shape, seed=number)
        optimizers[which].step()

    step(0, 1)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    assert isinstance(optimizers[1], Muon)
    for which in (0, 1):
        step(which, 2)
    assert torch.equal(models[0].weight, models[1].weight)
    assert torch.equal(models[0].bias, models[1].bias)


def test_adamw_of_another_package_does_not_go_with_it():
    with pytest.raises(ValueError, match="--optimizer-selection apex"):
        OptimizerConfig(lr=1.0, optimizer="muon", optimizer_selection="apex")
