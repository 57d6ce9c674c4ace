"""Rates of this machine's device, measured in less than a minute and kept in a file that `--device here` reads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import read_json_object, write_json
from mindspeed_mm.planning.devices import Device

if TYPE_CHECKING:
    from mindspeed_mm.accelerator import Accelerator

_REPEATS = 5
_RATES = ("half", "single", "attention_half", "attention_single", "bytes", "call")


def calibration_file() -> Path:
    """`calibration.json` in the user's cache: $XDG_CACHE_HOME or ~/.cache."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindspeed_mm" / "calibration.json"
    )


def read_calibration(dtype: str) -> Device:
    """This machine's device as measured. Raises ConfigError when nothing was, or the file is not ours."""
    path = calibration_file()
    if not path.is_file():
        raise ConfigError(
            "nothing is calibrated yet", where="--device here", fix="run vace plan --calibrate first"
        )
    values = read_json_object(path)
    numbers = [values.get(name) for name in (*_RATES, "memory")]
    if not all(isinstance(number, int | float) and number > 0 for number in numbers):
        raise ConfigError("not a calibration", where=path, fix="run vace plan --calibrate again")
    kind = "single" if dtype == "fp32" else "half"
    return Device(
        name=str(values.get("name", "here")),
        memory=values["memory"],
        half=values["half"],
        single=values["single"],
        link=450.0,
        network=50.0,
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
    """Measure, and write the file. → what it holds: TFLOP/s of products and attention, GB/s of elementwise arithmetic, GiB."""
    import torch

    on_cpu = accelerator.kind == "cpu"
    size, tokens = (1024, 1024) if on_cpu else (8192, 8192)
    found: dict[str, Any] = {"name": accelerator.device_name() or accelerator.kind}
    for name, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
        left = torch.randn(size, size, device=accelerator.device, dtype=dtype)
        found[name] = 2 * size**3 / _seconds(lambda left=left: left @ left, accelerator) / 1e12  # type: ignore[misc]
        found[f"attention_{name}"] = _attention(tokens, dtype, accelerator)
    many = torch.randn(1 << (24 if on_cpu else 28), device=accelerator.device)
    found["bytes"] = 8 * many.numel() / _seconds(lambda: many * 0.5, accelerator) / 1e9
    few = torch.ones(8, device=accelerator.device)
    found["call"] = _seconds(lambda: [few * 0.5 for _ in range(1000)], accelerator) / 1000
    found["kind"] = accelerator.kind
    found["memory"] = _memory(accelerator)
    write_json(calibration_file(), found)
    return found


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


def _seconds(work: Callable[[], object], accelerator: Accelerator) -> float:
    """The median of some runs; on a CPU with one thread its own time, which other programs change little."""
    import torch

    alone = accelerator.kind == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    taken = []
    for _ in range(_REPEATS + 1):
        accelerator.synchronize()
        start = clock()
        work()
        accelerator.synchronize()
        taken.append(clock() - start)
    return statistics.median(taken[1:])
