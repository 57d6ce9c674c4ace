"""Peak memory of one rank of a training run, on any machine.

Our own model under FakeTensorMode with a fake process group.

Nothing is computed and no memory is filled: torch's FSDPMemTracker counts what tensors would hold. A run that
is too deep to trace in seconds is traced at two small depths, and the line through them is followed to the
real one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import Config
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.training import build
from mindspeed_mm.training.config import OptimizerConfig
from mindspeed_mm.training.optim import build_optimizer


@dataclass(frozen=True)
class Traced:
    """One run to trace."""

    predictor: PredictorConfig
    grid: tuple[int, int, int]  # latent (R+F, h, w)
    text: int = 512
    batch: int = 1
    ranks: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fsdp: Fsdp2Config = field(default_factory=Fsdp2Config)
    transforms: tuple[Config, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


def depth(case: Traced, every: int, branch: int) -> Traced:
    """The same run with `branch` branch blocks on `every` times as many trunk blocks."""
    layers = tuple(range(0, every * branch, every))
    part = case.predictor.vace_dit.model_copy(update={"vace_layers": layers, "num_layers": None})
    return replace(
        case, predictor=case.predictor.model_copy(update={"num_layers": every * branch, "vace_dit": part})
    )


def peak(case: Traced) -> dict[str, float]:
    """Bytes at the peak of a second step (with optimizer state), by torch's own kinds, and their `Total`."""
    with world(case.ranks):
        return _peak(case)


@contextmanager
def world(ranks: int) -> Iterator[None]:
    """Rank 0 of `ranks` that answer nothing."""
    saved = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        groups.destroy()
        dist.destroy_process_group()
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _peak(case: Traced) -> dict[str, float]:
    accelerator = Accelerator.detect("cpu")
    mesh = build_mesh(case.parallel, accelerator, case.fsdp)
    with unfilled(), FakeTensorMode():
        model = build.build_model(
            case.predictor,
            case.parallel,
            case.fsdp,
            mesh,
            accelerator,
            source=None,
            transforms=case.transforms,
        )
        optimizer = build_optimizer(model, case.optimizer)
        inputs = make_inputs(case)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(tuple(inputs.values()))
        with tracker:
            step(model, optimizer, inputs)
            tracker.reset_mod_stats()
            tracker._peak_mem_snap = tracker.get_tracker_snapshot()
            tracker._peak_mem = {dev: snap["Total"] for dev, snap in tracker._peak_mem_snap.items()}
            step(model, optimizer, inputs)
        snapshot = tracker.get_tracker_snapshot("peak")
        return {str(getattr(k, "value", k)): float(v) for k, v in snapshot[torch.device("cpu")].items()}


@contextmanager
def unfilled() -> Iterator[None]:
    """Weights get memory and no values.

    torch cannot swap a plain parameter under FakeTensorMode, so those are replaced.
    """
    fill, to_empty = build.fill_parameters, nn.Module.to_empty

    def replace_plain(model: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
        tables = [(module, dict(module._parameters)) for module in model.modules()]
        for module, table in tables:
            for name, weight in table.items():
                if weight is not None and not isinstance(weight, DTensor):
                    del module._parameters[name]
        to_empty(model, device=device, recurse=recurse)
        for module, table in tables:
            sharded, module._parameters = module._parameters, {}
            for name, weight in table.items():
                empty = sharded[name] if name in sharded else torch.empty_like(weight, device=device)
                module._parameters[name] = (
                    empty if name in sharded else nn.Parameter(empty, requires_grad=weight.requires_grad)
                )
        return model

    build.fill_parameters, nn.Module.to_empty = lambda *_: None, replace_plain
    try:
        yield
    finally:
        build.fill_parameters, nn.Module.to_empty = fill, to_empty


def make_inputs(case: Traced) -> dict[str, Any]:
    """One micro-batch, without values."""
    trunk, batch = case.predictor, case.batch
    return {
        "latents": torch.empty(batch, trunk.in_dim, *case.grid),
        "timestep": torch.empty(batch),
        "prompt_embeds": torch.empty(batch, case.text, trunk.text_dim),
        "vace_context": torch.empty(batch, trunk.vace_dit.in_dim, *case.grid),
        "target": torch.empty(batch, trunk.out_dim, *case.grid),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> None:
    """Forward, backward, update."""
    values = {name: value for name, value in inputs.items() if name != "target"}
    loss = (model(**values).float() - inputs["target"]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
