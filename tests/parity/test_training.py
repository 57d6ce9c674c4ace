"""A training step is what a plain fp32 loop over diffusers' model does.

Same loss, same gradients, same weights after.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel

from mindspeed_mm.flow.matching import keyed_generator
from mindspeed_mm.models.transforms.match import is_trainable
from mindspeed_mm.models.wan.config import BRANCH
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.training.step import accumulate
from mindspeed_mm.training.timers import PhaseTimers
from tests.support.loops import CPU, Recorder, random_records, trainer, training
from tests.support.tiny import TINY, tiny_transformer

NAMES = KEY_MAPS["diffusers"]
SEED = 7


def oracle_of(model):
    trunk = TINY.trunk
    oracle = WanVACETransformer3DModel(
        patch_size=trunk.patch_size,
        num_attention_heads=trunk.num_heads,
        attention_head_dim=trunk.head_dim,
        text_dim=trunk.text_dim,
        freq_dim=trunk.freq_dim,
        ffn_dim=trunk.ffn_dim,
        num_layers=trunk.num_layers,
        eps=trunk.eps,
        vace_layers=list(TINY.vace_layers),
        vace_in_channels=TINY.vace_in_dim,
    )
    oracle.load_state_dict({NAMES.to_theirs(name): weight for name, weight in model.state_dict().items()})
    return oracle


def freeze(model, trainable, name_of=lambda name: name):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(name_of(name), trainable, BRANCH))
    return model


def reference_loss(oracle, record, index):
    """Flow matching written out: shift 5, bell weight, target noise - latents."""
    generator = keyed_generator(SEED, index)
    place = 1 + int(torch.randint(999, (), generator=generator))
    noise = torch.randn(record.latents.shape, generator=generator)
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    sigmas = 5 * u / (1 + 4 * u)
    bell = torch.exp(-2 * ((1000 * sigmas - 500) / 1000) ** 2)
    weights = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    sigma = float(sigmas[place])
    noisy = (1 - sigma) * record.latents + sigma * noise
    prompt = record.prompt_embeds[0]
    velocity = oracle(
        hidden_states=noisy[None],
        timestep=torch.tensor([1000 * sigma], dtype=torch.float32),
        encoder_hidden_states=F.pad(prompt, (0, 0, 0, TINY.trunk.text_len - len(prompt)))[None],
        control_hidden_states=record.vace_context[None],
        control_hidden_states_scale=torch.ones(len(TINY.vace_layers)),
    ).sample
    return float(weights[place]) * F.mse_loss(velocity[0], noise - record.latents)


@pytest.mark.parametrize("trainable", ["branch", "all"])
def test_loss_and_gradient_of_one_fixed_sample(trainable):
    records = random_records(1)
    model = freeze(tiny_transformer(), trainable)
    oracle = freeze(oracle_of(model), trainable, NAMES.to_ours)
    config = training(batch={"global_batch_size": 1, "train_iters": 1, "seed": SEED})
    run = trainer(model, config, records)
    work = accumulate(model, [next(run.data.batches)], run.step, CPU.device, PhaseTimers(CPU.device))
    loss = reference_loss(oracle, records[0], index=0)
    loss.backward()
    torch.testing.assert_close(work.losses[0], loss.detach(), atol=1e-5, rtol=1e-5)
    theirs = {NAMES.to_ours(name): parameter.grad for name, parameter in oracle.named_parameters()}
    for name, parameter in model.named_parameters():
        if theirs[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(
                parameter.grad, theirs[name], atol=2e-5, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_three_iterations_leave_the_weights_of_the_plain_loop():
    records, recorder = random_records(4), Recorder()
    model = freeze(tiny_transformer(), "branch")
    oracle = freeze(oracle_of(model), "branch", NAMES.to_ours)
    settings = {
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "adam_beta2": 0.95,
        "adam_eps": 1e-5,
        "weight_decay": 0.1,
    }
    config = training(optimizer=settings, batch={"seed": SEED, "global_batch_size": 2, "train_iters": 3})
    run = trainer(model, config, records, writers=[recorder])
    order = [
        draw
        for batch in itertools.islice(trainer(model, config, records).data.batches, 6)
        for draw in batch.keys
    ]
    run.run()

    named = [(name, p) for name, p in oracle.named_parameters() if p.requires_grad]
    spared = [p for name, p in named if p.ndim == 1 or name.endswith(("bias", "scale_shift_table"))]
    decayed = [p for _, p in named if not any(p is other for other in spared)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-5)
    by_key = {record.key: record for record in records}
    losses = []
    for iteration in range(3):
        pair = [(by_key[order[2 * iteration + j]], 2 * iteration + j) for j in range(2)]
        loss = sum(reference_loss(oracle, record, index) for record, index in pair) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    assert [values["loss"] for _, values in recorder.rows] == pytest.approx(losses, rel=2e-4)
    ours = model.state_dict()
    for name, parameter in oracle.named_parameters():
        # AdamW moves each weight by about lr whatever its gradient's size: where a gradient is rounding
        # noise, so is the move
        torch.testing.assert_close(ours[NAMES.to_ours(name)], parameter.detach(), atol=2e-4, rtol=1e-3)
