"""Specifications of devices, from their manufacturers' data sheets. Rates are dense, without sparsity.

H100, H200, A100, B200: NVIDIA's data sheets of the SXM boards and of DGX systems (B200: 1440 GB for eight).
RTX 4090 and 5090: NVIDIA's Ada and Blackwell architecture papers, bf16 with fp32 accumulation; no NVLink.
Ascend 910B: Atlas 800T A2. Ascend 910C: https://arxiv.org/abs/2506.12708; one of its two dies is one device.
Power is the board's limit; None if the manufacturer publishes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean


@dataclass(frozen=True)
class Device:
    """One accelerator and its links. Link rates are GB/s per device in one direction."""

    name: str
    memory: float  # usable GiB
    half: float  # TFLOP/s of 16-bit products
    single: float  # TFLOP/s of fp32 products as torch computes them by default
    link: float  # link inside a machine
    network: float  # link between machines
    host: float  # link to host memory
    machine: int  # devices per machine
    watts: float | None
    products: float = 0.45  # fraction of the peak that matrix products reach
    attention: float = 0.35  # fraction of the peak that attention reaches
    elementwise: float = 0.0  # GB/s of norms, gates and casts; 0: included in the fractions above
    call: float = 0.0  # seconds of an operation on a tiny tensor
    # whether each operation adds its latency, as on a CPU; accelerators hide it behind computation
    waits: bool = False

    def peak(self, dtype: str) -> float:
        """Return the peak FLOP/s of products in bf16 or fp32."""
        return 1e12 * (self.single if dtype == "fp32" else self.half)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H100", 79.1, 989.0, 67.0, 450.0, 50.0, 55.0, 8, 700.0),
        Device("H200", 139.8, 989.0, 67.0, 450.0, 50.0, 55.0, 8, 700.0),
        Device("A100", 79.1, 312.0, 19.5, 300.0, 25.0, 25.0, 8, 400.0),
        Device("B200", 178.0, 2250.0, 75.0, 900.0, 50.0, 55.0, 8, 1000.0),
        Device("RTX 4090", 23.5, 165.2, 82.6, 25.0, 1.25, 25.0, 8, 450.0),
        Device("RTX 5090", 31.3, 209.5, 104.8, 50.0, 1.25, 50.0, 8, 575.0),
        Device("Ascend 910B", 61.0, 353.9, 88.5, 196.0, 25.0, 25.0, 8, None),
        Device("Ascend 910C", 61.0, 376.0, 94.0, 196.0, 25.0, 25.0, 16, None),
    )
}


def find_device(name: str) -> Device:
    """Find a device by name, ignoring case, spaces and dashes. Raises ConfigError with the nearest name."""
    plain = {_plain(known): device for known, device in DEVICES.items()}
    found = plain.get(_plain(name))
    if found is None:
        nearest = did_you_mean(name, list(DEVICES)) or _nearest(name)
        raise ConfigError(
            f"unknown device {name[:40]!r}{nearest}",
            where="--device",
            fix=f"use one of {', '.join(DEVICES)}",
        )
    return found


def _nearest(name: str) -> str:
    """Suggest a device: `4080` is close to the RTX 4090, and `NVIDIA H100 80GB HBM3` is an H100."""
    plain, short = {_plain(known): known for known in DEVICES}, _plain(name[:200])
    found = [known for known in plain if known in short] or get_close_matches(short, list(plain), n=1)
    return f" (did you mean {plain[found[0]]!r}?)" if found else ""


def _plain(name: str) -> str:
    short = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    return short.removeprefix("nvidia").removeprefix("rtx").removeprefix("ascend")
