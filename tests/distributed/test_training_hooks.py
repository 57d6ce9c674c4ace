"""Hooks on several ranks: a failure or a stop of one is that of all, and state resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.training.state import unpack
from tests.support.hooks import register_probe
from tests.support.runs import arguments, make_run, train_job, write_json

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_run(tmp_path_factory.mktemp("a run"))


def with_hooks(environment: dict[str, str], folder: Path, *hooks: dict[str, object]) -> dict[str, str]:
    """The environment with these hooks in its model JSON."""
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    return {**environment, "MM_MODEL": str(write_json(folder / "model.json", {**model, "hooks": hooks}))}


def probed_job(argv: Sequence[str]) -> list[dict[str, Any]] | str:
    """Run `train_job` with {"type": "probe"} registered. Return the rows or the error."""
    register_probe()
    try:
        return train_job(argv)
    except MindSpeedMMError as error:
        return str(error)


def states(folder: Path, iteration: int) -> dict[str, Any]:
    """Map ranks to the states of their hooks in a checkpoint."""
    found = read_dcp(folder / f"iter_{iteration:07d}").get("hooks", {})
    return {rank: unpack(file.read(), rank) for rank, file in found.items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_failure_of_a_hook_on_one_rank_ends_all(
    world: Any, environment: dict[str, str], tmp_path: Path, rank: int
) -> None:
    changed = with_hooks(environment, tmp_path, {"type": "probe", "on_rank": rank, "fail_at": 2})
    order = arguments(changed, save=tmp_path / "save", global_batch_size=2, train_iters=12)
    assert world.run(2, probed_job, order) == [f"rank {rank}: the probe failed"] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_of_one_rank_stops_all_after_one_more(
    world: Any, environment: dict[str, str], tmp_path: Path, ranks: int
) -> None:
    changed = with_hooks(environment, tmp_path, {"type": "probe", "on_rank": 0, "stop_at": 2})
    order = arguments(changed, save=tmp_path / "save", global_batch_size=2, train_iters=12)
    rows = world.run(ranks, probed_job, order)[-1]
    assert [row["iteration"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "save").glob("iter_*")] == ["iter_0000003"]


def test_state_of_each_rank_resumes_exactly(world: Any, environment: dict[str, str], tmp_path: Path) -> None:
    changed = with_hooks(environment, tmp_path, {"type": "probe"}, {"type": "probe"})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    world.run(2, probed_job, arguments(changed, save=straight, train_iters=5, save_interval=2))
    world.run(2, probed_job, arguments(changed, save=stopped, train_iters=2))
    world.run(2, probed_job, arguments(changed, save=stopped, load=stopped, train_iters=5))
    wanted = states(straight, 5)
    assert states(stopped, 5) == wanted
    assert wanted["rank_00000"]["probe"]["mean"] != wanted["rank_00001"]["probe"]["mean"]
    assert [state["probe"] == state["probe#2"] for state in wanted.values()] == [True, True]
    assert states(straight, 4) != wanted


def test_rank_that_a_checkpoint_lacks_gets_the_first_state(
    world: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    changed = with_hooks(environment, tmp_path, {"type": "probe"})
    world.run(1, probed_job, arguments(changed, save=tmp_path / "save", train_iters=2))
    saved = states(tmp_path / "save", 2)["rank_00000"]["probe"]["mean"]
    rows = world.run(
        2, probed_job, arguments(changed, save=tmp_path / "save", load=tmp_path / "save", train_iters=3)
    )[-1]
    loss = next(row["loss"] for row in rows if row["iteration"] == 3 and "loss" in row)
    found = {rank: state["probe"]["mean"] for rank, state in states(tmp_path / "save", 3).items()}
    assert found == {"rank_00000": 0.7 * saved + loss + 0, "rank_00001": 0.7 * saved + loss + 1}


def test_hooks_may_come_and_go_between_runs(world: Any, environment: dict[str, str], tmp_path: Path) -> None:
    """A checkpoint without their state, and one with the state of a hook that is not on, both resume."""
    changed, save = with_hooks(environment, tmp_path, {"type": "probe"}), tmp_path / "save"
    world.run(2, probed_job, arguments(environment, save=save, train_iters=1))
    assert states(save, 1) == {}
    for iterations, jobs in ((2, changed), (3, environment)):
        rows = world.run(2, probed_job, arguments(jobs, save=save, load=save, train_iters=iterations))[-1]
        assert [row["iteration"] for row in rows if "loss" in row] == list(range(1, iterations + 1))
    assert set(states(save, 2)) == {"rank_00000", "rank_00001"}
    assert states(save, 3) == {}
