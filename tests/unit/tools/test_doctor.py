"""`vace doctor`: healthy and sick machines, each check by itself."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.cli.main import main
from mindspeed_mm.tools import doctor, doctor_device, doctor_machine
from mindspeed_mm.tools.doctor import Finding, run_check


def one(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    return found


def test_this_machine_passes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["doctor", "--data", str(tmp_path), "--out", str(tmp_path)])
    lines = capfd.readouterr().out.splitlines()
    for name in ("packages", "open files", "clock", "disk", "data", "video", "gloo", "cpu"):
        assert any(line[8:].startswith(name) for line in lines), name
    assert not any(line.startswith("broken") for line in lines)
    assert not list(tmp_path.iterdir())


def test_broken_things_end_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def sick() -> list[Finding]:
        raise RuntimeError("driver version is insufficient\nmore")

    monkeypatch.setattr(doctor, "all_checks", lambda data, out: {"device": sick})
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    printed = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(printed.out)["checks"] == [
        {
            "name": "device",
            "state": "broken",
            "found": "RuntimeError: driver version is insufficient",
            "fix": "",
        }
    ]
    assert len(printed.err.strip().splitlines()) == 1
    assert "device" in printed.err


def test_packages_name_what_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", "no-such-package>=1", 'only-for-tests; extra == "dev"', "numpy"]
    monkeypatch.setattr(doctor_machine, "requires", lambda name: lines)
    found = one(doctor_machine.check_packages())
    assert found.state == "broken"
    assert "torch is" in found.found
    assert "no-such-package is" in found.found
    assert "missing" in found.found
    assert "only-for-tests" not in found.found


@pytest.mark.parametrize(("soft", "state"), [(256, "warn"), (65536, "ok")])
def test_open_files_are_checked_by_the_limit(soft: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, 1 << 20))
    found = next(doctor_machine.check_limits())
    assert found.state == state
    assert ("4096" in found.fix) == (state == "warn")


@pytest.mark.parametrize(("soft", "hard"), [(1024, 1024), (256, 1024)])
def test_open_files_beyond_the_hard_limit_need_more(
    soft: int, hard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    fix = next(doctor_machine.check_limits()).fix
    assert "nofile to 4096" in fix
    assert (f"ulimit -n {hard}" in fix) == (soft < hard)


def test_folder_that_takes_no_files_is_named_with_its_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_machine.tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setattr(doctor_machine.tempfile, "TemporaryFile", refuse)
    out, data = one(doctor_machine.check_clock(tmp_path)), one(doctor_machine.check_speed(tmp_path))
    assert (out.state, data.state) == ("broken", "warn")
    for found, flag in ((out, "--out"), (data, "--data")):
        assert str(tmp_path) in found.found
        assert "Permission denied" in found.found
        assert flag in found.fix


def test_little_shared_memory_and_disk_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    found = {finding.name: finding for finding in doctor_machine.check_limits()}
    assert found["shared memory"].state == "warn"
    assert one(doctor_machine.check_space(tmp_path)).state == "warn"


def test_clock_is_compared_with_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert one(doctor_machine.check_clock(tmp_path)).state == "ok"
    stat: Callable[..., Any] = os.stat

    def ahead(path: Any, **rest: Any) -> Any:
        return SimpleNamespace(st_mtime=stat(path, **rest).st_mtime + 90)

    monkeypatch.setattr(doctor_machine.os, "stat", ahead)
    found = one(doctor_machine.check_clock(tmp_path))
    assert found.state == "warn"
    assert "90" in found.found


def test_slow_disk_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine, "PROBE", 1 << 20)
    monkeypatch.setattr(doctor_machine, "SLOW", 1e9)
    assert one(doctor_machine.check_speed(tmp_path)).state == "warn"


def test_step_is_compared_with_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(doctor_device.check_devices()).state == "ok"
    monkeypatch.setattr(doctor_device, "attend", lambda q, k, v: (q + k) * 0 + v * 2)
    assert one(doctor_device.check_devices()).state == "broken"


def test_driver_without_torchs_device_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINDSPEED_MM_DEVICE", raising=False)
    monkeypatch.setattr(
        Accelerator, "detect", lambda: Accelerator(kind="cpu", device=torch.device("cpu"), backend="gloo")
    )
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    found = next(doctor_device.check_devices())
    assert (found.name, found.state) == ("device", "broken")
    assert "CUDA" in found.fix


def test_groups_without_an_interface_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    found = run_check("group", doctor_device.check_groups)[0]
    assert found.state == "broken"
    assert "GLOO_SOCKET_IFNAME" in found.fix


def test_folder_that_is_missing_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--data", "nowhere"])
    assert ended.value.code == 1
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
