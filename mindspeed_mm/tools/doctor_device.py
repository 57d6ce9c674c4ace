"""The `vace doctor` checks that need torch: a small step on each device, and an all-reduce of two ranks."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.ops.attention import attend, attend_reference
from mindspeed_mm.tools.doctor import Finding

_DRIVERS = {"nvidia-smi": "a CUDA build of torch", "npu-smi": "torch_npu, and CANN's set_env.sh"}
_TIMEOUT = timedelta(seconds=10)
_TOLERANCE = 0.05  # tolerance of attention in bf16


def check_devices() -> Iterator[Finding]:
    """Report each device with its name and memory, and check the result of a small step on it."""
    first = Accelerator.detect()
    if first.kind == "cpu":
        driver = next((name for name in _DRIVERS if shutil.which(name)), None)
        if driver is not None and "MINDSPEED_MM_DEVICE" not in os.environ:
            text = f"{driver} is installed, but torch {torch.__version__} finds no device"
            yield Finding("device", "broken", text, f"install {_DRIVERS[driver]}")
        yield _step(first)
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(first.kind, index)
        yield _step(Accelerator(kind=first.kind, device=device, backend=first.backend))


def check_groups() -> Iterator[Finding]:
    """Sum over two gloo ranks on this machine, and check that torch has the device's collective library."""
    start, sums, errors = time.perf_counter(), [0.0, 0.0], list[str]()
    store = HashStore()

    def rank(number: int) -> None:
        try:
            group: Any = dist.ProcessGroupGloo(store, number, 2, _TIMEOUT)
            value = torch.tensor([float(number + 1)])
            group.allreduce([value]).wait()
            sums[number] = float(value)
        except RuntimeError as error:  # the type of torch's process-group errors
            errors.append(str(error).strip().splitlines()[0])

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_TIMEOUT.total_seconds() + 1)
    fix = "make the host name resolve (/etc/hosts), or set GLOO_SOCKET_IFNAME to an interface, for example lo"
    if errors or sums != [3.0, 3.0]:
        yield Finding("gloo", "broken", errors[0] if errors else f"two ranks got {sums}", fix)
    else:
        yield Finding("gloo", "ok", f"two ranks summed in {time.perf_counter() - start:.1f} s")
    kind = Accelerator.detect().kind
    if kind == "cuda":
        there = dist.is_nccl_available()
        fix = "" if there else "install a CUDA build of torch"
        yield Finding("nccl", "ok" if there else "broken", "in torch" if there else "missing", fix)


def _step(accelerator: Accelerator) -> Finding:
    """Run attention with gradients in bf16, and a matrix product in fp32."""
    device = accelerator.device
    name = f"{accelerator.kind}:{device.index}" if device.index is not None else accelerator.kind
    torch.manual_seed(0)
    start = time.perf_counter()
    q, k, v = (torch.randn(1, 128, 2, 64, device=device) for _ in range(3))
    parts = [part.bfloat16().requires_grad_() for part in (q, k, v)]
    output = attend(*parts)
    gradients = torch.autograd.grad(output.float().square().sum(), parts)
    expected = attend_reference(*(part.detach().float().cpu() for part in parts))
    off = float((output.detach().float().cpu() - expected).abs().max())
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    seconds = time.perf_counter() - start
    memory = accelerator.total_memory() / 2**30
    text = f"{accelerator.device_name() or name}, {memory:.1f} GiB, a step in {seconds:.2f} s"
    if not finite or off > _TOLERANCE:
        return Finding(name, "broken", f"{text}, attention is off by {off:.3g}", "reinstall driver and torch")
    return Finding(name, "ok", text)
