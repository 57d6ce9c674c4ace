"""The whole of training learns: four clips are overfitted, and what is frozen stays as it was."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import LoraConfig
from mindspeed_mm.models.transforms.lora import lora_sizes
from mindspeed_mm.models.transforms.match import is_trainable
from mindspeed_mm.models.transforms.plan import plan_transforms
from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.wan.flops import block_forward, peak_tflops, recomputed_share, step_flops
from mindspeed_mm.training.validation import held_out_loss, quantile_indices
from tests.support.loops import random_records, trainer, training
from tests.support.tiny import TINY, tiny_transformer

pytestmark = pytest.mark.medium


class Zero(torch.nn.Module):
    """Predicts no velocity at all."""

    def forward(self, noisy, *_):
        return torch.zeros_like(noisy)


class TrunkOnly(torch.nn.Module):
    """The same model, its branch switched off."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, noisy, timestep, prompt_embeds, _):
        return self.model(noisy, timestep, prompt_embeds, None)


def fixed_noise_loss(model, records, schedule):
    values = held_out_loss(
        model,
        records,
        schedule,
        quantiles=4,
        max_records=4,
        seed=3,
        exclude_refs=False,
        device=torch.device("cpu"),
    )
    return values["validation/loss"]


def quiet_model(trainable):
    """Weights as a trained model's: head and join small, so that it starts near predicting nothing."""
    model = tiny_transformer()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trainable(name, trainable, BRANCH))
            if name.startswith("head.head") or "after_proj" in name:
                parameter.mul_(0.1)
    return model


def overfit(trainable, iterations, lr):
    records = random_records(4)
    config = training(
        optimizer={"lr": lr, "adam_beta2": 0.95},
        batch={"micro_batch_size": 4, "global_batch_size": 4, "train_iters": iterations},
        log={"log_interval": 1000},
    )
    model = quiet_model(trainable)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, config, records)
    run.run()
    return model, frozen, records, run.step.schedule


@pytest.mark.slow
def test_training_everything_halves_the_trivial_loss():
    model, _, records, schedule = overfit("all", 400, 3e-3)
    assert fixed_noise_loss(model, records, schedule) < 0.5 * fixed_noise_loss(Zero(), records, schedule)


@pytest.mark.slow
def test_training_the_branch_leaves_the_trunk_bytes():
    model, frozen, records, schedule = overfit("branch", 150, 3e-3)
    assert fixed_noise_loss(model, records, schedule) < fixed_noise_loss(TrunkOnly(model), records, schedule)
    assert frozen
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
            assert parameter.grad is None, name


def test_held_out_loss_is_repeatable():
    model, records = tiny_transformer(), random_records(3, ((3, 4, 6), (2, 6, 4)))
    schedule = trainer(model, training(), records).step.schedule
    places = quantile_indices(schedule, 4)
    assert places == sorted(set(places))
    assert [round(place, -1) for place in places] == [120, 380, 620, 880]
    model.train()
    first, second = (fixed_noise_loss(model, records, schedule) for _ in range(2))
    assert first == second
    assert model.training
    by_rank = [
        held_out_loss(
            model,
            records,
            schedule,
            quantiles=2,
            max_records=3,
            seed=3,
            exclude_refs=False,
            device=torch.device("cpu"),
            dp_rank=rank,
            dp_size=2,
        )
        for rank in range(2)
    ]
    assert by_rank[0] != by_rank[1]  # each rank looks at its own clips


def test_operations_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_transformer()
    record = random_records(1)[0]
    tokens = 3 * 2 * 3
    inputs = (
        record.latents[None],
        torch.tensor([500.0]),
        record.prompt_embeds[0][None],
        record.vace_context[None],
    )

    def counted(trainable):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trainable(name, trainable, BRANCH))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs).square().mean().backward()
        return counter.get_total_flops()

    for trainable in ("all", "trunk", "branch"):  # the counter sees the time embedding, too
        ours = step_flops(TINY, tokens, trainable, text=len(record.prompt_embeds[0])).model
        assert ours == pytest.approx(counted(trainable), rel=0.03), trainable


@pytest.mark.parametrize("on", ["branch", "trunk", "both"])
def test_operations_of_a_lora_are_those_that_torch_counts(on):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_transformer()
    for transform in plan_transforms(
        MODELS.get("vace"), "branch", torch.float32, [LoraConfig(rank=2, on=on)]
    ):
        transform.apply(model)
    record = random_records(1)[0]
    inputs = (
        record.latents[None],
        torch.tensor([500.0]),
        record.prompt_embeds[0][None],
        record.vace_context[None],
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs).square().mean().backward()
    rows = len(record.prompt_embeds[0])
    ours = step_flops(TINY, 3 * 2 * 3, "branch", text=rows, lora=lora_sizes(model)).model
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.04)
    assert ours < step_flops(TINY, 3 * 2 * 3, "all", text=rows).model


def test_recomputing_all_blocks_costs_one_forward_of_them_more():
    plain, again = (step_flops(TINY, 100, "all", recomputed=recomputed) for recomputed in (0.0, 1.0))
    assert again.model == plain.model == plain.hardware
    assert 1.2 < again.hardware / again.model < 4 / 3


def test_known_device_has_a_peak_and_an_unknown_one_has_none():
    assert peak_tflops("NVIDIA H200", "bf16") == 989
    assert peak_tflops("cpu", "fp32") is None


def test_selective_recomputes_all_but_attention():
    plan = [f"blocks.{i}" for i in range(4)] + ["vace_blocks.0", "vace_blocks.1"]
    on_tokens, on_text, attention = block_forward(TINY, 18)
    kept = attention / (on_tokens + on_text + attention)
    assert recomputed_share(TINY, dict.fromkeys(plan, "full"), "all", 18) == pytest.approx(1.0)
    assert recomputed_share(TINY, dict.fromkeys(plan, "selective"), "all", 18) == pytest.approx(1 - kept)
    assert recomputed_share(TINY, {}, "all", 18) == 0
    # no gradient reaches trunk block 0 when only the branch trains, so it never runs again
    assert recomputed_share(TINY, dict.fromkeys(plan, "full"), "branch", 18) == pytest.approx(5 / 6)


def test_parts_of_a_block_sum_to_the_block():
    parts = {f"vace_blocks.1.{part}": "full" for part in ("self_attn", "cross_attn", "ffn")}
    whole = recomputed_share(TINY, {"vace_blocks.1": "full"}, "all", 18)
    assert recomputed_share(TINY, parts, "all", 18) == pytest.approx(whole)
    assert recomputed_share(TINY, {**parts, "vace_blocks.1": "full"}, "all", 18) == pytest.approx(whole)
