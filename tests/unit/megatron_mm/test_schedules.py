"""Batch arithmetic and learning rates, against closed formulas."""

import math

import pytest
import torch

from megatron.mm.schedules import check_batch, num_micro_batches, param_scheduler, schedule_steps
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.training.config import OptimizerConfig
from tests.support.errors import raises


def rates(iters: int, gbs: int = 4, **settings: object) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = OptimizerConfig.model_validate({"lr": 1e-3, **settings})
    scheduler = param_scheduler(optimizer, config, train_iters=iters, global_batch_size=gbs)
    found = []
    for _ in range(iters):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(gbs)
    return found


def test_constant_stays():
    assert rates(5, lr_decay_style="constant") == [1e-3] * 5


def test_warm_up_counts_samples_and_cosine_falls_to_the_minimum():
    found = rates(12, lr_decay_style="cosine", lr_warmup_iters=4, min_lr=1e-4)
    assert found[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    expected = [1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (i - 4) / 8)) for i in range(5, 12)]
    assert found[5:] == pytest.approx(expected)


def test_linear_and_inverse_square_root():
    assert rates(4, lr_decay_style="linear") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    found = rates(9, gbs=1, lr_decay_style="inverse-square-root", lr_warmup_iters=4)
    assert found[8] == pytest.approx(1e-3 * math.sqrt(4 / 8))


def test_wsd_is_flat_and_then_falls():
    found = rates(10, lr_decay_style="WSD", lr_wsd_decay_iters=4, lr_wsd_decay_style="linear")
    assert found[:7] == pytest.approx([1e-3] * 7)
    assert found[7:] == pytest.approx([7.5e-4, 5e-4, 2.5e-4])


def test_warm_up_fraction_is_of_the_decay():
    assert schedule_steps(OptimizerConfig(lr=1.0, lr_warmup_fraction=0.1), 100, 8) == (80, 800, None)


def test_lengths_in_samples_equal_lengths_in_iterations():
    style = {"lr": 1.0, "lr_decay_style": "WSD"}
    in_samples = OptimizerConfig(lr_warmup_samples=16, lr_decay_samples=400, lr_wsd_decay_samples=40, **style)
    in_iters = OptimizerConfig(lr_warmup_iters=2, lr_decay_iters=50, lr_wsd_decay_iters=5, **style)
    assert schedule_steps(in_samples, 100, 8) == schedule_steps(in_iters, 100, 8) == (16, 400, 40)


@pytest.mark.parametrize("kind", ["warmup", "decay"])
def test_length_given_twice_is_rejected(kind):
    with pytest.raises(ValueError, match=rf"--lr-{kind}-iters\b.*--lr-{kind}-samples\b"):
        OptimizerConfig(**{"lr": 1.0, f"lr_{kind}_iters": 2, f"lr_{kind}_samples": 16})


def test_resumed_schedule_keeps_place_and_takes_new_shape():
    def make(lr: float):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        config = OptimizerConfig(lr=lr, lr_decay_style="linear")
        return optimizer, param_scheduler(optimizer, config, train_iters=10, global_batch_size=2)

    _, first = make(1e-3)
    first.step(10)
    optimizer, second = make(4e-3)
    second.load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)


def test_weight_decay_follows_each_groups_multiplier():
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "wd_mult": 1.0},
        {"params": [torch.nn.Parameter(torch.zeros(1))], "wd_mult": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    config = OptimizerConfig(lr=1.0, weight_decay=0.1)
    param_scheduler(optimizer, config, train_iters=10, global_batch_size=1).step(1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_micro_batches_accumulate_to_the_global_batch():
    assert num_micro_batches(2, 16, 4) == 2


def test_global_batch_defaults_to_one_micro_batch_a_rank():
    assert check_batch(2, None, 4) == 8


def test_global_batch_that_does_not_divide_names_one_that_does():
    with raises(ConfigError, "--global-batch-size", 10, 4, 8):
        check_batch(2, 10, 2)


def test_warm_up_longer_than_the_decay_is_an_error():
    with raises(ConfigError, "--lr-warmup-iters", 10):
        schedule_steps(OptimizerConfig(lr=1.0, lr_warmup_iters=10), 10, 1)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"min_lr": 2.0}, r"\bmin_lr 2\b.*\blr 1\b"),
        ({"lr_warmup_init": 2.0}, r"\blr_warmup_init 2\b.*\blr 1\b"),
        (
            {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3},
            r"--lr-warmup-fraction\b.*--lr-warmup-iters\b",
        ),
        ({"lr_decay_style": "WSD"}, r"--lr-decay-style WSD\b.*--lr-wsd-decay-iters\b"),
    ],
)
def test_contradicting_rates_are_rejected(settings, facts):
    with pytest.raises(ValueError, match=facts):
        OptimizerConfig.model_validate({"lr": 1.0, **settings})
