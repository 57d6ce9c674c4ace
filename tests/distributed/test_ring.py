"""Rings, alone and between groups that exchange heads: the loss and gradients of one rank."""

import pytest
import torch

from mindspeed_mm.distributed.config import ParallelConfig
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.ring import ring_attend
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.ops.attention import attend_reference
from tests.distributed.jobs import CPU, Setup, gradients
from tests.distributed.test_context_parallel import GRIDS

RING = {"context_parallel_algo": "megatron_cp_algo"}
HYBRID = {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
LAYOUTS = {"2": (2, RING), "3": (3, RING), "4": (4, RING), "2 x 2": (4, HYBRID)}


def around(size, lengths):
    """Inside a process group: largest differences of output and gradients from attention on one rank."""
    mesh = build_mesh(ParallelConfig(context_parallel_size=size, **RING), CPU)
    generator = torch.Generator().manual_seed(1)
    total, padded = sum(lengths), max(lengths)
    q, k, v = (torch.randn(2, total, 3, 16, generator=generator).requires_grad_() for _ in range(3))
    above = torch.randn(2, total, 3, 16, generator=generator)
    whole = attend_reference(q, k, v)
    wanted = (whole, *torch.autograd.grad(whole, (q, k, v), above))
    first = sum(lengths[: mesh.rank])
    mine = slice(first, first + lengths[mesh.rank])

    def part(tensor):
        found = torch.full((2, padded, 3, 16), 7.0)  # padding must not count
        found[:, : lengths[mesh.rank]] = tensor[:, mine].detach()
        return found.requires_grad_()

    own = (q[:, mine].detach().requires_grad_(), part(k), part(v))
    out = ring_attend(*own, lengths, mesh.ring_group)
    grads = torch.autograd.grad(out, own, above[:, mine])
    differences = []
    for found, expected in zip((out, *grads), wanted, strict=True):
        rows = found[:, : lengths[mesh.rank]] - expected[:, mine]
        differences.append(float(rows.abs().max()) if rows.numel() else 0.0)
        assert not found[:, lengths[mesh.rank] :].any()
    return differences


@pytest.mark.parametrize("lengths", [(6, 6), (6, 1), (5, 5, 5, 2), (4, 4, 1, 0)])
def test_ring_is_attention_to_all_keys(world, lengths):
    for differences in world.run(len(lengths), around, len(lengths), lengths):
        assert max(differences) < 1e-6


@pytest.fixture(scope="module")
def alone(world):
    """→ what one rank makes of these settings; made once."""
    made = {}

    def make(grid="45 tokens", **settings):
        key = (grid, *settings.values())
        if key not in made:
            made[key] = world.run(1, gradients, Setup(**settings), GRIDS[grid])[0]
        return made[key]

    return make


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_loss_and_gradients_equal_one_rank(world, alone, grid, layout):
    ranks, parallel = layout
    wanted_loss, wanted = alone(grid, trainable="all")
    setup = Setup(trainable="all", cp=ranks, parallel=parallel)
    loss, found = world.run(ranks, gradients, setup, GRIDS[grid])[0]
    assert loss == pytest.approx(wanted_loss, abs=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_blocks_go_around_too(world, alone, granularity):
    recomputed = {"recompute_granularity": granularity, **HYBRID}
    _, wanted = alone()
    _, found = world.run(4, gradients, Setup(cp=4, parallel=recomputed))[0]
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_bf16_gradients_are_within_3_percent(world):
    """Of the whole gradient's norm: bf16 sums in another order."""
    _, wanted = world.run(1, gradients, Setup(dtype="bf16"))[0]
    _, found = world.run(2, gradients, Setup(dtype="bf16", cp=2, parallel=RING))[0]
    difference = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    assert 0 < difference / whole < 0.03


def refused():
    try:
        Setup(cp=3, parallel={**HYBRID, "ulysses_degree_in_cp": 3}).build()
    except ConfigError as error:
        return str(error)
    return "built"


def test_heads_limit_the_inner_groups(world):
    assert "1, 2, 4" in world.run(3, refused)[0]
