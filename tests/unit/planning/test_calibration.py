"""`vace plan --calibrate`: rates of the device at hand, kept in a file that `--device here` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import read_json
from mindspeed_mm.planning import calibrate as module
from mindspeed_mm.planning.calibrate import calibrate, calibration_file, read_calibration
from mindspeed_mm.tasks.jobs.plan import read_job
from mindspeed_mm.tasks.plan import make_plan
from tests.support.errors import raises

VACE = Path(__file__).resolve().parents[3] / "examples/vace"
FILES = ["--model", f"{VACE}/1.3B/pretrain_model.json", "--data", f"{VACE}/1.3B/feature_data.json"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_seconds", lambda work, accelerator: 0.01)


def test_measured_rates_plan_a_run_on_this_device() -> None:
    found = calibrate(Accelerator.detect("cpu"))

    assert read_json(calibration_file()) == found
    assert found["single"] == pytest.approx(2 * 1024**3 / 0.01 / 1e12)
    job, flags = read_job([*FILES, "--device", "here", "--devices", "1"])
    plan = make_plan(job, flags)
    assert plan.device.memory == found["memory"]
    assert plan.device.waits
    assert plan.time.total > 0


def test_unmeasured_device_is_an_error() -> None:
    job, flags = read_job([*FILES, "--device", "here"])
    with raises(ConfigError, "--calibrate", where="--device here"):
        make_plan(job, flags)


@pytest.mark.parametrize("text", ["{}", '{"half": "fast"}'])
def test_file_without_calibration_is_an_error(text: str) -> None:
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(text)
    with raises(ConfigError, "--calibrate", where=str(calibration_file())):
        read_calibration("bf16")
