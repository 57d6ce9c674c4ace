"""Creates the process group of a run: torchrun's ranks or a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from socket import if_nameindex
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import LaunchError, MindSpeedMMError
from mindspeed_mm.processes import STORE

T = TypeVar("T")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def launch(
    accelerator: Accelerator, timeout: timedelta = timedelta(minutes=10), backend: str | None = None
) -> Iterator[Accelerator]:
    """Join torchrun's ranks, or run as a single rank, and leave the group afterwards. Raises LaunchError."""
    accelerator.activate()
    _join(accelerator, timeout, backend or accelerator.backend)
    try:
        yield accelerator
    finally:
        groups.destroy()
        if dist.is_initialized():
            dist.destroy_process_group()


def join_group(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    """Join the ranks described by the environment. Ranks on one node use the loopback interface."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] and any(
        name == "lo" for _, name in if_nameindex()
    ):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listening = os.environ.pop(STORE, None)
    if listening is None:  # torchrun itself serves the rendezvous
        dist.init_process_group(backend, timeout=timeout, device_id=device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        use_libuv=_libuv_takes_a_socket(torch.__version__),
        master_listen_fd=int(listening) if listening else None,
    )
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device
    )


def _libuv_takes_a_socket(version: str) -> bool:
    """Return whether the libuv store of this torch accepts an open socket. If not, use the older store."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (2, 8)


def raise_on_all_ranks(work: Callable[[], T]) -> T:
    """Call `work`, which uses no collectives, on every rank.

    If any rank fails, all ranks raise the error of the lowest failing rank, because the others would
    otherwise wait in their next collective.
    """
    made: list[T] = []
    failed: MindSpeedMMError | None = None
    try:
        made.append(work())
    except MindSpeedMMError as error:
        failed = error
    failed = next((error for error in gather_objects(failed) if error is not None), None)
    if failed is not None:
        raise failed
    return made[0]


def gather_objects(value: T) -> list[T]:
    """Gather `value` from all ranks, in rank order. A collective; [value] outside a process group."""
    if not dist.is_initialized():
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _join(accelerator: Accelerator, timeout: timedelta, backend: str) -> None:
    # gloo as well, because object collectives and asynchronous checkpoints use the CPU
    both = backend if accelerator.kind == "cpu" else f"cpu:gloo,{accelerator.kind}:{backend}"
    device = None if accelerator.kind == "cpu" else accelerator.device
    if "RANK" not in os.environ:
        dist.init_process_group(
            both, store=HashStore(), rank=0, world_size=1, timeout=timeout, device_id=device
        )
        return
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise LaunchError(
            f"RANK is set, but {', '.join(missing)} is not", fix="start the ranks with torchrun"
        )
    try:
        join_group(both, timeout, device)
    except (RuntimeError, ValueError, torch.distributed.DistError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LaunchError(
            f"could not join {address} over {both}: {first}",
            where=f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}",
            fix="check MASTER_ADDR, MASTER_PORT, NNODES and that every node was started",
        ) from error
