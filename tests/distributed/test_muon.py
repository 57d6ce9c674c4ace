"""Muon needs whole matrices; sharded ones must step as whole ones do."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_mm.training import muon
from tests.distributed.jobs import Run, Setup, plain, train, train_to
from tests.distributed.test_resume import compare

STEPS = 3


@pytest.fixture(scope="module")
def reference():
    return plain(STEPS, name="muon")


@pytest.mark.parametrize(
    ("ranks", "setup"),
    [
        pytest.param(
            1, Setup(optimizer="muon", fsdp={"offload_to_cpu": True, "pin_memory": False}), id="1 rank"
        ),
        pytest.param(2, Setup(optimizer="muon"), id="2 ranks"),
        pytest.param(4, Setup(optimizer="muon"), id="4 ranks"),
        pytest.param(4, Setup(optimizer="muon", fsdp={"sharding_size": 2}), id="2 copies over 2 ranks each"),
        pytest.param(2, Setup(optimizer="muon", fsdp={"sharding_size": 1}), id="a copy on each rank"),
        pytest.param(4, Setup(optimizer="muon", cp=2), id="cp 2, dp 2"),
    ],
)
def test_losses_and_weights_match_one_process(world, reference, ranks, setup):
    losses, weights = world.run(ranks, train, setup, STEPS)[0]

    assert losses == pytest.approx(reference[0], abs=1e-5)
    for name, weight in reference[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)


def uneven(mesh_shape: tuple[int, int], shape: tuple[int, int], count: int) -> list[tuple[int, float]]:
    """Return the length of each portion of `count` sharded matrices and its distance from one process."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "shards"))
    places = [Replicate(), Shard(0)]
    matrices = [
        torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number in range(count)
    ]
    sharded = [torch.nn.Parameter(distribute_tensor(matrix, mesh, places)) for matrix in matrices]
    rows = distribute_tensor(torch.arange(shape[0]), mesh, places).to_local()
    wanted = iter(muon.newton_schulz(torch.stack(matrices)))
    found = []
    with mock.patch.object(
        muon, "ELEMENTS_AT_ONCE", shape[0] * shape[1]
    ):  # one matrix for each rank at a time
        for portion in muon._portions(sharded):
            slices = muon.orthogonalized([matrix.detach() for matrix in portion])
            found.append((len(slices), max(float((part - next(wanted)[rows]).norm()) for part in slices)))
    return found


@pytest.mark.parametrize("mesh_shape", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("shape", [(6, 5), (3, 8)])
def test_muon_handles_uneven_rows_and_many_matrices(world, mesh_shape, shape):
    for answer in world.run(4, uneven, mesh_shape, shape, 6):  # 6 rows on 4 ranks: 2, 2, 2 and none
        assert [length for length, _ in answer] == [4, 2]
        assert max(error for _, error in answer) < 1e-4


def test_copies_share_the_work_without_gathering_all_slices():
    """On 2 x 8 ranks a copy sends the slices of its half of the matrices only."""
    sent = []

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "c10d" in func.namespace:
                sent.append((func.overloadpacket.__name__, args[0].numel()))
            return func(*args, **kwargs or {})

    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 8), mesh_dim_names=("copies", "shards"))
        matrices = [DTensor.from_local(torch.ones(1, 4), mesh, [Replicate(), Shard(0)]) for _ in range(16)]
        with Collectives():
            muon.orthogonalized(matrices)
    finally:
        dist.destroy_process_group()
    # there, back, and to the other copy: 8 of 16 matrices, so 8 slices of 4 numbers (a CPU gathers where
    # others exchange)
    assert [numbers for name, numbers in sent if "all_" in name] == [32, 32, 32]


def test_stopped_run_resumes_exactly_and_on_other_ranks(world, tmp_path):
    setup = Setup(optimizer="muon")
    straight = world.run(2, train_to, Run(tmp_path / "straight", setup), 6)[0]
    run = Run(tmp_path / "stopped", setup)
    world.run(2, train_to, run, 3, save_at=(3,), tensors=False)
    assert compare(world.run(2, train_to, run, 6)[0], straight) == []
    assert "exp_avg_sq" not in straight["moments"]["vace_blocks.0.ffn.0.weight"], (
        "one moment, half of AdamW's memory"
    )
    wider = world.run(4, train_to, run, 6, tensors=False)[0]
    assert wider["losses"][5] == pytest.approx(straight["losses"][5], abs=1e-5)


@pytest.mark.parametrize(("saved", "given"), [("adam", "muon"), ("muon", "adam")])
def test_moments_of_the_other_optimizer_are_reported(world, tmp_path, saved, given):
    world.run(2, train_to, Run(tmp_path, Setup(optimizer=saved)), 1, save_at=(1,), tensors=False)
    with pytest.raises(AssertionError, match="--no-load-optim"):
        world.run(2, train_to, Run(tmp_path, Setup(optimizer=given)), 2)
    run = Run(tmp_path, Setup(optimizer=given), {"no_load_optim": True})
    anew = world.run(2, train_to, run, 2, tensors=False)[0]
    assert min(anew["losses"]) == 1
