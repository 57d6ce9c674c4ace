"""A process group for the time of a run: torchrun's, or one process by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import LaunchError

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def launch(
    accelerator: Accelerator, timeout: timedelta = timedelta(minutes=10), backend: str | None = None
) -> Iterator[Accelerator]:
    """Join torchrun's ranks (or be one rank alone), and leave them again. Raises LaunchError."""
    accelerator.activate()
    _join(accelerator, timeout, backend or accelerator.backend)
    try:
        yield accelerator
    finally:
        groups.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(accelerator: Accelerator, timeout: timedelta, backend: str) -> None:
    # gloo beside the device's library: object collectives and asynchronous checkpoints talk over the CPU
    both = backend if accelerator.kind == "cpu" else f"cpu:gloo,{accelerator.kind}:{backend}"
    device = None if accelerator.kind == "cpu" else accelerator.device
    if "RANK" not in os.environ:
        dist.init_process_group(both, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device)
        return
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise LaunchError(f"RANK is set but {', '.join(missing)} is not; start the ranks with torchrun")
    try:
        dist.init_process_group(both, timeout=timeout, device_id=device)
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LaunchError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join {address} over {both}: {first}; "
            "check MASTER_ADDR, MASTER_PORT, NNODES and that every node was started"
        ) from error
