"""Ulysses: the tokens of one sample on several ranks give the loss and gradients of one rank."""

import pytest
import torch

from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.sequence import SharedTokens
from mindspeed_mm.errors import ConfigError
from tests.distributed.jobs import CPU, Setup, gradients

GRIDS = {
    "45 tokens": {"frames": 3, "height": 6, "width": 10},
    "7 tokens, one rank has padding only": {"frames": 1, "height": 2, "width": 14},
    "one token": {"frames": 1, "height": 2, "width": 2},
    "two references in front": {"frames": 5, "height": 6, "width": 6},
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_loss_and_gradients_equal_one_rank(world, grid):
    wanted_loss, wanted = world.run(1, gradients, Setup(trainable="all"), grid)[0]
    for ranks in (2, 4):
        loss, found = world.run(ranks, gradients, Setup(trainable="all", cp=ranks), grid)[0]
        assert loss == pytest.approx(wanted_loss, abs=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=name)


def test_bf16_gradients_are_within_3_percent(world):
    """Of the whole gradient's norm: bf16 sums in another order."""
    _, wanted = world.run(1, gradients, Setup(dtype="bf16"))[0]
    _, found = world.run(2, gradients, Setup(dtype="bf16", cp=2))[0]
    difference = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert 0 < difference / whole < 0.03


def test_recomputed_blocks_share_tokens_too(world):
    recomputed = {"recompute_granularity": "selective"}
    _, wanted = world.run(1, gradients, Setup())[0]
    _, found = world.run(2, gradients, Setup(cp=2, parallel=recomputed))[0]
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=name)


def split_and_joined(length):
    mesh = build_mesh(ParallelConfig(context_parallel_size=4), CPU, Fsdp2Config())
    tokens = SharedTokens(mesh.cp_group)
    x = torch.arange(2.0 * length * 3).view(2, length, 3)
    part = tokens.split(x, 1)
    return part.shape[1], torch.equal(tokens.join(part, 1, length), x)


@pytest.mark.parametrize("length", [1, 4, 5, 21 * 23 * 3])
def test_no_token_is_lost(world, length):
    assert world.run(4, split_and_joined, length) == [(-(-length // 4), True)] * 4


def refused():
    try:
        Setup(cp=3).build()
    except ConfigError as error:
        return str(error)
    return "built"


def test_size_that_does_not_divide_heads_is_rejected(world):
    message = world.run(3, refused)[0]
    assert "--context-parallel-size" in message
    assert "1, 2, 4" in message
