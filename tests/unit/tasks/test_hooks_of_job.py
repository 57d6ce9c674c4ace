"""`hooks` of a training job are checked before torch is imported. Each mistake has its address."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.training.hooks.config import EarlyStopConfig
from tests.support.errors import raises
from tests.unit.tasks.test_pretrain_job import VACE, argv


def job(folder: Path, hooks: object, *, held_out: bool = True, more: tuple[str, ...] = ()) -> PretrainJob:
    values = json.loads((VACE / "14B/pretrain_model.json").read_text())
    path = folder / "model.json"
    path.write_text(json.dumps({**values, "hooks": hooks}))
    validation = '--set=data.dataset_param.validation={"data_path": "held_out.jsonl"}'
    flags = [f"--mm-model={path}", *([validation] if held_out else []), *more]
    return PretrainJob.from_argv(argv("14B", "pretrain_model.json", *flags), ranks=1)


@pytest.mark.parametrize(
    ("hooks", "where", "facts"),
    [
        ({"type": "early_stop"}, "model.json:hooks", ["list", "object"]),
        ([{"patience": 2}], "model.json:hooks[0]", ["early_stop"]),
        (["early_stop"], "model.json:hooks[0]", ["early_stop"]),
        ([{"type": "early_stopp"}], "model.json:hooks[0].type", ["early_stopp", "early_stop"]),
        ([{"type": "early_stop"}, {"type": "x"}], "model.json:hooks[1].type", ["x", "early_stop"]),
        ([{"type": "early_stop", "patiens": 2}], "model.json:hooks[0].patiens", ["patience"]),
        ([{"type": "early_stop", "patience": 0}], "model.json:hooks[0].patience", [0]),
        ([{"type": "early_stop", "min_delta": -1}], "model.json:hooks[0].min_delta", [-1]),
    ],
)
def test_bad_hooks_are_rejected_with_their_address(
    tmp_path: Path, hooks: object, where: str, facts: list[object]
) -> None:
    with raises(ConfigError, *facts, where=where):
        job(tmp_path, hooks)


def test_hooks_are_read_and_kept_in_job_json(tmp_path: Path) -> None:
    made = job(tmp_path, [{"type": "early_stop", "patience": 3}])
    assert made.model.hooks == (EarlyStopConfig(patience=3),)
    (tmp_path / "job.json").write_text(made.to_json())
    assert PretrainJob.from_file(tmp_path / "job.json").model.hooks == made.model.hooks


def test_early_stop_needs_a_held_out_loss(tmp_path: Path) -> None:
    where = f"{tmp_path / 'model.json'}:hooks[0]"
    with raises(ConfigError, "dataset_param.validation", where=where):
        job(tmp_path, [{"type": "early_stop"}], held_out=False)
    with raises(ConfigError, "--eval-iters", where=where):
        job(tmp_path, [{"type": "early_stop"}], more=("--eval-iters=0",))
