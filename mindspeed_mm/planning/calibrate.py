"""Measure the rates of this machine's device in less than a minute, for `--device here`.

On several ranks, it also measures their all-to-all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import read_json_object, write_json
from mindspeed_mm.planning.devices import Device

if TYPE_CHECKING:
    from mindspeed_mm.accelerator import Accelerator

_REPEATS = 5
_RATES = ("half", "single", "attention_half", "attention_single", "bytes", "call")
_LINK, _NETWORK = 450.0, 50.0  # GB/s between devices and machines if nothing was measured: those of an H100
Clock = Callable[[], float]


def calibration_file() -> Path:
    """Return the path of `calibration.json` in the user's cache: $XDG_CACHE_HOME or ~/.cache."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindspeed_mm" / "calibration.json"
    )


def read_calibration(dtype: str) -> Device:
    """Read the measured rates of this machine. Raises ConfigError if there is no valid calibration."""
    path = calibration_file()
    if not path.is_file():
        raise ConfigError(
            "this machine is not calibrated", where="--device here", fix="run vace plan --calibrate first"
        )
    values = read_json_object(path)
    numbers = [values.get(name) for name in (*_RATES, "memory")]
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise ConfigError("not a calibration", where=path, fix="run vace plan --calibrate again")
    return device_of(values, dtype)


def device_of(values: Mapping[str, Any], dtype: str) -> Device:
    """Convert measured rates to a Device."""
    kind = "single" if dtype == "fp32" else "half"
    return Device(
        name=str(values.get("name", "here")),
        memory=values["memory"],
        half=values["half"],
        single=values["single"],
        link=values.get("link") or _LINK,
        network=values.get("network") or _NETWORK,
        host=25.0,
        machine=8,
        watts=None,
        products=1.0,
        attention=values[f"attention_{kind}"] / values[kind],
        elementwise=values["bytes"],
        call=values["call"],
        waits=values.get("kind") == "cpu",
    )


def calibrate(accelerator: Accelerator) -> dict[str, Any]:
    """Measure on every rank, write the file on rank 0, and return its content."""
    import torch.distributed as dist

    found = {"name": accelerator.device_name() or accelerator.kind, **rates(accelerator)}
    found |= {"kind": accelerator.kind, "memory": _memory(accelerator)}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        on_one = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
        found |= {"link" if on_one else "network": _link(accelerator), "ranks": ranks}
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(calibration_file(), found)
    return found


def rates(accelerator: Accelerator, kinds: Sequence[str] = ("half", "single")) -> dict[str, float]:
    """Measure TFLOP/s of products and attention, GB/s of elementwise ops, and seconds per call.

    `kinds`: `half` for 16 bits, `single` for fp32.
    """
    import torch

    on_cpu = accelerator.kind == "cpu"
    size, tokens = (1024, 1024) if on_cpu else (8192, 8192)
    found: dict[str, float] = {}
    for name in kinds:
        dtype = {"half": torch.bfloat16, "single": torch.float32}[name]
        left = torch.randn(size, size, device=accelerator.device, dtype=dtype)
        seconds = _seconds(lambda left=left: left @ left, accelerator)  # type: ignore[misc]
        found[name] = 2 * size**3 / seconds / 1e12
        found[f"attention_{name}"] = _attention(tokens, dtype, accelerator)
    many = torch.randn(1 << (24 if on_cpu else 28), device=accelerator.device)
    held = torch.empty_like(many)

    def elementwise() -> None:
        """Write into new and into reused memory, as a training step does."""
        torch.mul(many * 0.5, 0.5, out=held)

    found["bytes"] = 16 * many.numel() / _seconds(elementwise, accelerator) / 1e9
    few = torch.ones(8, device=accelerator.device)
    found["call"] = _seconds(lambda: [few * 0.5 for _ in range(1000)], accelerator) / 1000
    return found


def cpu_clock(accelerator: Accelerator) -> Clock:
    """Return the clock to measure with.

    On a CPU with one thread, this is the CPU time of the process, which other load hardly affects.
    """
    import torch

    alone = accelerator.kind == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _attention(tokens: int, dtype: Any, accelerator: Accelerator) -> float:
    import torch

    from mindspeed_mm.ops.attention import attend

    heads, width = 4, 128
    parts = [
        torch.randn(1, tokens, heads, width, device=accelerator.device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]
    seconds = _seconds(lambda: torch.autograd.grad(attend(*parts).sum(), parts), accelerator)
    return 3 * 4 * tokens * tokens * heads * width / seconds / 1e12


def _memory(accelerator: Accelerator) -> float:
    import torch

    if accelerator.kind == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30
    module = getattr(torch, accelerator.kind)
    return float(module.get_device_properties(accelerator.device).total_memory) / 2**30


def _link(accelerator: Accelerator) -> float:
    """Measure the GB/s that one rank sends in an all-to-all; the minimum over ranks."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    part = (1 << (21 if accelerator.kind == "cpu" else 26)) // ranks  # elements sent to each rank
    sent = torch.ones(part * ranks, device=accelerator.device)
    got = torch.empty_like(sent)
    dist.barrier()
    seconds = _seconds(lambda: dist.all_to_all_single(got, sent), accelerator, time.perf_counter)
    found = torch.tensor([4 * part * (ranks - 1) / seconds / 1e9], device=accelerator.device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


def _seconds(work: Callable[[], object], accelerator: Accelerator, clock: Clock | None = None) -> float:
    """Return the minimum time of several runs, which is the least disturbed one."""
    clock = clock or cpu_clock(accelerator)
    taken = []
    for _ in range(_REPEATS + 1):
        accelerator.synchronize()
        start = clock()
        work()
        accelerator.synchronize()
        taken.append(clock() - start)
    return min(taken[1:])
