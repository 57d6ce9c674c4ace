"""Losses and gradients with stages match one rank without stages, within 1e-6 in fp32."""

import pytest
import torch

from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.pipeline import Pipeline
from mindspeed_mm.ops.stages import MicroBatch
from mindspeed_mm.training.build import build_model
from tests.distributed.jobs import CPU, FromModule, predictor, sample, whole
from tests.support.tiny import tiny_transformer

OTHER = {"frames": 1, "height": 4, "width": 6}
GRIDS = [None, None, OTHER, None, None, OTHER, None, None]  # of each sample; None: 45 tokens
PP2 = {"pipeline_model_parallel_size": 2}
RINGS = {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}
LAYOUTS = {
    "stages": (2, PP2, [2, 2]),
    "uneven": (2, PP2, [3, 1]),
    "virtual": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, [1, 1, 1, 1]),
    "data": (4, PP2, [2, 2]),
    "context": (4, {**PP2, "context_parallel_size": 2}, [2, 2]),
    "ring": (4, {**PP2, **RINGS}, [2, 2]),
    "gpipe": (2, {**PP2, "pipeline_schedule": "gpipe"}, [1, 3]),
    "recomputed": (2, {**PP2, "recompute_granularity": "selective"}, [2, 2]),
    "copies": (4, PP2, [2, 2], {"sharding_size": 1}),
    "offloaded": (2, PP2, [2, 2], {"offload_to_cpu": True, "pin_memory": False}),
}


def trained(flags, layers, number, yaml=None):
    """Inside a process group, return the mean loss of eight samples, and gradients by name."""
    parallel, fsdp = ParallelConfig(**flags), Fsdp2Config(param_dtype="fp32", **(yaml or {}))
    mesh = build_mesh(parallel, CPU, fsdp)
    source = FromModule(tiny_transformer(0))
    part = predictor(trainable="all")
    model = build_model(part, parallel, fsdp, mesh, CPU, source=source, layers=layers)
    share = number // mesh.dp_size
    mine = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
    pairs = [sample(index, GRIDS[index]) if GRIDS[index] else sample(index) for index in mine]
    losses = torch.zeros(share)

    def loss(velocity, place):
        found = (velocity - pairs[place][1]).square().mean()
        losses[place] = found.detach()
        return found / share

    if isinstance(model, Pipeline):
        model.forward_backward([MicroBatch(**inputs) for inputs, _ in pairs], loss)
        model.broadcast_from_last(losses)
    else:
        for place, (inputs, _) in enumerate(pairs):
            loss(model(**inputs), place).backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, Pipeline):
        found = {name: gradient for name, gradient in found.items() if not model.is_copy(name)}
    torch.distributed.all_reduce(losses)  # of ranks with other samples, and of those with the same
    return float(losses.sum()) / number * mesh.dp_size / mesh.world_size, found


@pytest.fixture(scope="module")
def alone(world):
    return world.run(1, trained, {}, (), len(GRIDS))[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_and_gradients_match_one_rank(world, alone, layout):
    ranks, flags, layers, *yaml = layout
    answers = world.run(ranks, trained, flags, layers, len(GRIDS), *yaml)
    found = {name: gradient for _, gradients in answers for name, gradient in gradients.items()}
    assert [loss for loss, _ in answers] == pytest.approx([alone[0]] * ranks, abs=1e-6)
    assert found.keys() == alone[1].keys()
    for name, gradient in alone[1].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=name)
