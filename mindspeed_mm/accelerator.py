"""Detects the accelerator (cpu, cuda or npu).

A task does this once. The rest of the package receives a torch.device and never names a device type.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_mm.errors import LaunchError
from mindspeed_mm.limits import total_memory
from mindspeed_mm.log import get_logger, local_rank

logger = get_logger(__name__)
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # the dtypes that flags and JSON files name


@dataclass(frozen=True)
class Accelerator:
    """The device that this process computes on."""

    kind: str  # cpu | cuda | npu
    device: torch.device  # with the local index, e.g. cuda:3
    backend: str  # gloo | nccl | hccl

    @classmethod
    def detect(cls, kind: str | None = None) -> Accelerator:
        """Return the machine's accelerator, or the CPU. LOCAL_RANK selects the device.

        `kind` or MINDSPEED_MM_DEVICE overrides the detection.

        Raises LaunchError if the requested device is missing, or if torch finds one without a known backend.
        """
        wanted = kind or os.environ.get("MINDSPEED_MM_DEVICE")
        found = torch.accelerator.current_accelerator(check_available=True)
        name = wanted or (found.type if found is not None else "cpu")
        if name not in BACKENDS:
            raise LaunchError(
                f"device {name!r} is not supported",
                fix=f"set MINDSPEED_MM_DEVICE to one of {', '.join(BACKENDS)}",
            )
        if name == "cpu":
            return cls(kind="cpu", device=torch.device("cpu"), backend="gloo")
        if found is None or found.type != name:
            raise LaunchError(
                f"device {name!r} is requested, but torch {torch.__version__} finds "
                f"{found or 'only the cpu'}",
                fix=f"install a torch for {name} and its driver, or set MINDSPEED_MM_DEVICE=cpu",
            )
        index = local_rank()
        if index >= torch.accelerator.device_count():
            raise LaunchError(
                f"local rank {index} has no device: this machine has {torch.accelerator.device_count()} "
                f"{name} device(s)",
                fix="lower NPUS_PER_NODE (torchrun --nproc-per-node)",
            )
        return cls(kind=name, device=torch.device(name, index), backend=BACKENDS[name])

    def hint_slow_bf16(self, used: bool, advice: str) -> None:
        """Log one line if bf16 is `used` on a CPU without bf16 instructions."""
        if used and self.kind == "cpu" and not _has_bf16_instructions():
            logger.warning(
                f"bf16 on this CPU ({torch.backends.cpu.get_cpu_capability()}, without AVX-512 or AMX) can "
                f"be ten times slower than fp32; {advice}"
            )

    def activate(self) -> None:
        """Make this the current device of the process (no effect on a CPU)."""
        if self.kind != "cpu":
            torch.accelerator.set_device_index(self.device.index)

    def synchronize(self) -> None:
        """Wait for all queued work (no effect on a CPU)."""
        if self.kind != "cpu":
            torch.accelerator.synchronize(self.device)

    def memory_allocated(self) -> int:
        """Return the bytes held by tensors on the device; on a CPU, the resident size of the process."""
        return (
            int(self._module().memory_allocated(self.device))
            if self.kind != "cpu"
            else _status_bytes("VmRSS")
        )

    def max_memory_allocated(self) -> int:
        """Return the peak bytes since `reset_peak_memory`; on a CPU, the process's peak resident size."""
        return (
            int(self._module().max_memory_allocated(self.device))
            if self.kind != "cpu"
            else _status_bytes("VmHWM")
        )

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement.

        On a CPU, this requires a kernel that lets a process reset its peak. Otherwise, the peak is that of
        the whole process.
        """
        if self.kind != "cpu":
            self._module().reset_peak_memory_stats(self.device)
            return
        with suppress(OSError), open("/proc/self/clear_refs", "w") as kernel:
            kernel.write("5")  # proc(5): resets VmHWM to VmRSS

    def total_memory(self) -> int:
        """Return the memory of the device in bytes; on a CPU, that of the machine or its container."""
        if self.kind == "cpu":
            return total_memory()
        return int(self._module().get_device_properties(self.device).total_memory)

    def empty_cache(self) -> None:
        """Release cached blocks to the device (no effect on a CPU)."""
        if self.kind != "cpu":
            self._module().empty_cache()

    def device_name(self) -> str:
        """Return the name of this device for the log."""
        return "cpu" if self.kind == "cpu" else str(self._module().get_device_name(self.device))

    def _module(self) -> Any:
        return torch.get_device_module(self.device)


def _status_bytes(field: str) -> int:
    """Return a kB field of /proc/self/status in bytes, or 0 if there is no such file."""
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _has_bf16_instructions() -> bool:
    """Return whether oneDNN, whose bf16 kernels torch uses, finds bf16 instructions; True if unknown."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True
