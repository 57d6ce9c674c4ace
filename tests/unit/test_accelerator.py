"""cpu, cuda and npu behind one object.

The two that are not here are stood in for by what torch answers about them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_mm import accelerator
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import LaunchError
from tests.support.errors import raises

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 8) -> None:
    """Make torch answer as on a machine with `count` devices of `kind`."""
    found = None if kind is None else SimpleNamespace(type=kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.delenv("MINDSPEED_MM_DEVICE", raising=False)


@pytest.mark.parametrize(("kind", "backend"), [("cuda", "nccl")])
def test_device_family_decides_the_backend(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, kind)
    monkeypatch.setenv("LOCAL_RANK", "5")
    found = Accelerator.detect()
    assert (found.kind, found.backend, found.device) == (kind, backend, torch.device(kind, 5))


def test_npu_is_driven_by_hccl() -> None:
    """Runs in its own process, because torch accepts the name `npu` only once, as torch_npu registers it."""
    source = """
import sys, types, torch
torch.utils.rename_privateuse1_backend("npu")
torch.accelerator.current_accelerator = lambda check_available=False: types.SimpleNamespace(type="npu")
torch.accelerator.device_count = lambda: 8
from mindspeed_mm import accelerator
from mindspeed_mm.accelerator import Accelerator
found = Accelerator.detect()
sys.exit((found.kind, found.backend, str(found.device)) != ("npu", "hccl", "npu:1"))
"""
    environment = {**os.environ, "LOCAL_RANK": "1"}
    environment.pop("MINDSPEED_MM_DEVICE", None)
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment).returncode == 0


def test_without_an_accelerator_it_is_the_cpu_with_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    monkeypatch.setenv("LOCAL_RANK", "5")  # CPU ranks share the one device
    found = Accelerator.detect()
    assert (found.kind, found.backend, found.device) == ("cpu", "gloo", torch.device("cpu"))


def test_environment_overrides_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda")
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    assert Accelerator.detect().kind == "cpu"
    assert Accelerator.detect("cuda").kind == "cuda"  # an argument is nearer than the environment


@pytest.mark.parametrize(
    ("kind", "wanted", "facts"),
    [
        (None, "cuda", ("'cuda'", torch.__version__, "the cpu")),
        ("cuda", "npu", ("npu", "cuda")),
        (None, "tpu", ("tpu", "MINDSPEED_MM_DEVICE", "cpu, cuda, npu")),
        ("xpu", None, ("xpu",)),
    ],
)
def test_absent_device_is_rejected_with_those_found(
    kind: str | None, wanted: str | None, facts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, kind)
    with raises(LaunchError, *facts):
        Accelerator.detect(wanted)


def test_more_ranks_than_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", count=2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with raises(LaunchError, 2, "NPUS_PER_NODE"):
        Accelerator.detect()


def test_cpu_counts_the_process_s_memory() -> None:
    cpu = Accelerator.detect("cpu")
    before = cpu.memory_allocated()
    block = torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB, touched
    assert cpu.memory_allocated() - before > 48 << 20
    assert cpu.max_memory_allocated() >= cpu.memory_allocated() - (1 << 20)
    assert cpu.total_memory() > block.numel()
    assert cpu.device_name() == "cpu"


def test_cpu_synchronize_and_empty_cache_do_nothing() -> None:
    cpu = Accelerator.detect("cpu")
    for action in (cpu.activate, cpu.synchronize, cpu.empty_cache, cpu.reset_peak_memory):
        action()


@pytest.mark.parametrize(
    ("used", "supported", "count"), [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_slow_bf16_on_a_cpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, used: bool, supported: bool, count: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr(accelerator.logger, "warning", said.append)
    monkeypatch.setattr(accelerator, "_has_bf16_instructions", lambda: supported)
    advice = "set dtype=fp32"
    Accelerator.detect("cpu").hint_slow_bf16(used, advice)
    assert len(said) == count
    assert all("AVX" in line and line.endswith(advice) for line in said)
