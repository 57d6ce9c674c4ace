"""Traces are written for the asked-for iterations, on the asked-for ranks."""

from __future__ import annotations

import torch

from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.training.config import ProfileConfig
from mindspeed_mm.training.profiler import build_observer
from mindspeed_mm.training.tools_config import ToolsConfig
from tests.support.errors import raises

CPU = torch.device("cpu")


def tools(path, **changes):
    profile = {
        "enable": True,
        "ranks": [0],
        "static_param": {"save_path": str(path), "start_step": 2, "end_step": 3},
    }
    return ToolsConfig.model_validate({"profile": {**profile, **changes}})


def traces(path, config, flags=None, rank=0):
    observe = build_observer(config, flags or ProfileConfig(), CPU, rank)
    for iteration in range(1, 5):
        torch.ones(4) @ torch.ones(4)
        observe(iteration)
    return list(path.glob("*.json")) if path.exists() else []


def test_tools_json_records_its_iterations(tmp_path):
    assert len(traces(tmp_path / "traces", tools(tmp_path / "traces"))) == 1


def test_other_ranks_and_a_disabled_profile_record_nothing(tmp_path):
    assert traces(tmp_path / "a", tools(tmp_path / "a"), rank=1) == []
    assert traces(tmp_path / "b", tools(tmp_path / "b", enable=False)) == []


def test_flag_records_without_the_file(tmp_path):
    config = tools(tmp_path / "c", enable=False)
    flags = ProfileConfig(profile=True, profile_step_start=1, profile_step_end=3, profile_ranks=(0,))
    assert len(traces(tmp_path / "c", config, flags)) == 1


def test_dynamic_profile_is_rejected_only_when_on(tmp_path):
    assert tools(tmp_path, enable=False, profile_type="dynamic")
    with raises(ConfigError, "tools.json:profile", "profile_type"):
        parse(ToolsConfig, {"profile": {"enable": True, "profile_type": "dynamic"}}, "tools.json")
