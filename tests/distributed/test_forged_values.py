"""A checkpoint whose index is sound and whose values are not.

One line that names the entry, and nothing is run or believed.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.containers.tensors import TensorFile
from tests.distributed.jobs import CPU, Run, load_error, train_to
from tests.support.errors import raises
from tests.unit.models.test_forged_index import forge

State = dict[str, Any]
LARGE = torch.zeros(1 << 21, dtype=torch.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, State]]:
    run = Run(tmp_path_factory.mktemp("saved"), base=None)
    with launch(CPU, timedelta(minutes=1)):
        train_to(run, 2, save_at=(2,))
        yield run, materialized(read_dcp(run.folder / "iter_0000002"))


def materialized(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: materialized(item) for key, item in value.items()}
    return value.read().clone() if isinstance(value, TensorFile) else value


def pack(values: object) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def raw(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def put(value: Any, *path: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return change


def moment(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def run(state: State) -> None:
        moments = state["optimizer"]["state"]
        name = next(iter(moments))
        moments[name][key] = change(moments[name][key].clone())

    return run


def weight(change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def run(state: State) -> None:
        name = next(iter(state["model"]))
        state["model"][name] = change(state["model"][name].clone())

    return run


def first_is(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.view(-1).index_fill_(0, torch.tensor([0]), value).view(tensor.shape)


def without_step(state: State) -> None:
    for moments in state["optimizer"]["state"].values():
        del moments["step"]


def heads(state: State) -> None:
    config = json.loads(state["config"])
    config["trunk"]["num_heads"] *= 2
    state["config"] = json.dumps(config)


CASES: dict[str, tuple[Callable[[State], None], str]] = {
    "iteration is NaN": (put(torch.tensor(float("nan")), "iteration"), "iteration"),
    "iteration is a vector": (put(torch.tensor([2, 2]), "iteration"), "iteration"),
    "samples are negative": (put(torch.tensor(-5), "sampler", "consumed_samples"), "consumed_samples"),
    "samples are huge": (put(torch.tensor(2**62), "sampler", "consumed_samples"), "consumed_samples"),
    "samples are missing": (put({}, "sampler"), "consumed_samples"),
    "skips name a class": (put(pack({"__class__": 1}), "skips"), "skips"),
    "skips are a list": (put(pack([1]), "skips"), "skips"),
    "skips are strings": (put(pack({"in_a_row": "x", "total": "y"}), "skips"), "skips"),
    "skips are nested deep": (put(raw(b"[" * 100_000), "skips"), "skips"),
    "skips have 5000 digits": (put(raw(b'{"total": ' + b"9" * 5000 + b"}"), "skips"), "skips"),
    "skips are no text": (put(raw(b"\xff{"), "skips"), "skips"),
    "skips are floats": (put(torch.tensor([1.5]), "skips"), "skips"),
    "skips are large": (put(LARGE, "skips"), "skips"),
    "schedule is empty": (put(pack({}), "schedule"), "schedule"),
    "schedule is a list": (put(pack([]), "schedule"), "schedule"),
    "means have two columns": (put(pack([[1, 2]]), "loss_means", "rank_00000"), "loss_means"),
    "means are strings": (put(pack([["a", "b", "c"]]), "loss_means", "rank_00000"), "loss_means"),
    "hooks are a list": (put({"rank_00000": pack([1])}, "hooks"), "hooks"),
    "state of a hook is a number": (put({"rank_00000": pack({"a": 1})}, "hooks"), "hooks"),
    "generator is short": (put(torch.zeros(3, dtype=torch.uint8), "rng", "rank_00000", "cpu"), "no-load-rng"),
    "generator is float": (put(torch.zeros(5056), "rng", "rank_00000", "cpu"), "rng"),
    "group steps are a number": (put(pack(5), "optimizer", "group_steps"), "group_steps"),
    "group steps are an object": (put(pack({"a": 1}), "optimizer", "group_steps"), "group_steps"),
    "moment has another shape": (moment("exp_avg", lambda t: torch.zeros(3)), "exp_avg"),
    "moment is integer": (moment("exp_avg", lambda t: t.to(torch.int32)), "exp_avg"),
    "moment is NaN": (moment("exp_avg", first_is(float("nan"))), "NaN"),
    "second moment is negative": (moment("exp_avg_sq", first_is(-1e9)), "exp_avg_sq"),
    "step is missing": (without_step, "step"),
    "weight is integer": (weight(lambda t: t.to(torch.int32)), "model."),
    "weight has another shape": (weight(lambda t: torch.zeros(2)), "model."),
    "config is nested deep": (put("[" * 100_000, "config"), "config"),
    "config has other heads": (heads, "num_heads"),
    "config is a tensor": (put(torch.zeros(2), "config"), "config"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_forged_value_is_rejected_by_name(saved: tuple[Run, State], tmp_path: Path, name: str) -> None:
    run, state = saved
    change, expected = CASES[name]
    state = copy.deepcopy(state)
    change(state)
    forged = tmp_path / "iter_0000002"
    dcp.save(state, checkpoint_id=forged, no_dist=True)
    shutil.copy(run.folder / "latest_checkpointed_iteration.txt", tmp_path)
    fresh, _, points = Run(tmp_path, base=None).start()
    with pytest.raises(WeightsError) as error:
        points.load(fresh)
    assert expected in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 600


def in_last_row(state: State) -> None:
    """A negative second moment that only the last rank of a sharded run reads."""
    moments = state["optimizer"]["state"]
    name = max(moments, key=lambda name: moments[name]["exp_avg_sq"].numel())
    moments[name]["exp_avg_sq"][-1] = -1.0


def short_generator_of_rank_1(state: State) -> None:
    state["rng"]["rank_00001"] = {"cpu": torch.zeros(3, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "expected"), [(in_last_row, "exp_avg_sq"), (short_generator_of_rank_1, "rng")]
)
def test_value_that_one_rank_rejects_stops_every_rank(
    world: Any, saved: tuple[Run, State], tmp_path: Path, change: Callable[[State], None], expected: str
) -> None:
    run, state = saved
    state = copy.deepcopy(state)
    change(state)
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000002", no_dist=True)
    shutil.copy(run.folder / "latest_checkpointed_iteration.txt", tmp_path)
    said = world.run(2, load_error, Run(tmp_path, base=None))
    assert said[0] == said[1]
    assert expected in said[0]


@pytest.mark.usefixtures("saved")
def test_forged_index_runs_nothing_on_load(tmp_path: Path) -> None:
    folder, trace = forge(tmp_path)
    fresh, _, points = Run(folder.parent, base=None).start()
    with raises(WeightsError, ".metadata"):
        points.load(fresh)
    assert not trace.exists()


def test_checkpoint_without_checksums_still_loads(saved: tuple[Run, State], tmp_path: Path) -> None:
    run, state = saved
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000002", no_dist=True)
    shutil.copy(run.folder / "latest_checkpointed_iteration.txt", tmp_path)
    fresh, _, points = Run(tmp_path, base=None).start()
    assert points.load(fresh)
    assert (fresh.iteration, fresh.consumed_samples, fresh.skips.total) == (2, 8, 2)
