"""This rank's position in the data, context and pipeline parallel groups, and the mesh of fully_shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig, data_parallel_size
from mindspeed_mm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Groups and ranks of one process. dp·cp ranks share the weights and gradients of a pipeline stage."""

    rank: int
    world_size: int
    dp_rank: int  # selects this rank's samples
    dp_size: int
    cp_rank: int  # selects their tokens
    cp_size: int
    pp_rank: int  # selects the layers
    pp_size: int
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    ulysses_group: dist.ProcessGroup  # ranks of cp_group that exchange heads
    ring_group: dist.ProcessGroup | None  # ranks of cp_group that pass keys and values around a ring
    dp_cp_group: dist.ProcessGroup
    shards: DeviceMesh  # [shard], or [replicate, shard] with more than one copy of the weights

    @property
    def copies(self) -> int:
        """Number of copies of the weights in the job (HSDP replicas)."""
        return int(self.shards.size(0)) if self.shards.ndim == 2 else 1


def build_mesh(parallel: ParallelConfig, accelerator: Accelerator, fsdp: Fsdp2Config | None = None) -> Mesh:
    """Create the groups inside `launch`. Raises ConfigError if the sizes do not divide the world size."""
    world = dist.get_world_size()
    data_size = data_parallel_size(parallel, world)
    stages = parallel.pipeline_model_parallel_size
    copies = copies_of_weights((fsdp or Fsdp2Config()).sharding_size, world // stages)
    if parallel.use_mindspeed:
        groups.import_mindspeed()
    made = groups.initialize(
        parallel.context_parallel_size,
        copies,
        parallel.distributed_timeout_minutes,
        pipeline_size=stages,
        virtual_size=parallel.virtual_size,
        ulysses_size=parallel.ulysses_size,
    )
    return Mesh(
        rank=dist.get_rank(),
        world_size=world,
        dp_rank=dist.get_rank(made.data),
        dp_size=data_size,
        cp_rank=dist.get_rank(made.context),
        cp_size=parallel.context_parallel_size,
        pp_rank=dist.get_rank(made.pipeline),
        pp_size=stages,
        pp_group=made.pipeline,
        dp_group=made.data,
        cp_group=made.context,
        ulysses_group=made.ulysses,
        ring_group=made.ring,
        dp_cp_group=made.data_context,
        shards=device_mesh(made, accelerator.kind),
    )


def copies_of_weights(sharding_size: int | str | None, world_size: int) -> int:
    """Return the number of weight copies. Raises ConfigError if `sharding_size` does not divide the world."""
    if sharding_size is None or isinstance(sharding_size, str):
        return 1
    if world_size % sharding_size:
        allowed = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ConfigError(
            f"{sharding_size} does not divide {world_size} rank(s)",
            where="fsdp2_config.yaml:sharding_size",
            fix=f"use auto or one of {', '.join(map(str, allowed))}",
        )
    return world_size // sharding_size


def device_mesh(made: groups.Groups, device_type: str) -> DeviceMesh:
    """Build a DeviceMesh from Megatron's groups, so that Megatron modules in the job use the same ones."""
    if made.replica is None:
        return DeviceMesh.from_group(made.shard, device_type, mesh_dim_names=("shard",))
    ranks = torch.tensor(dist.get_process_group_ranks(made.data_context))
    table = ranks.view(-1, dist.get_world_size(made.shard))
    pair: list[Any] = [made.replica, made.shard]
    return DeviceMesh.from_group(pair, device_type, mesh=table, mesh_dim_names=("replicate", "shard"))
