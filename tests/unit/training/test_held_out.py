"""Held-out loss by task with intervals, the checkpoint of the lowest one, scores of validation videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.mm.layout import saved_iterations
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.evaluation.report import read_report
from mindspeed_mm.evaluation.stats import mean_of
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.tasks.training_hooks import interval_of, names_of_tasks
from mindspeed_mm.tasks.validation_videos import ValidationVideos
from mindspeed_mm.training.checkpoint import Checkpointer
from mindspeed_mm.training.checkpoint_folder import BEST, Best, read_best
from mindspeed_mm.training.config import CheckpointConfig
from mindspeed_mm.training.hooks.evaluation import held_out_lines
from mindspeed_mm.training.validation import held_out_loss
from tests.support.errors import raises
from tests.support.loops import CPU, Recorder, Records, random_records, trainer, training
from tests.support.tiny import tiny_transformer, write_official

pytestmark = pytest.mark.medium


class TaskRecords(Records):
    """Features that name their task."""

    tasks = ("gray", "inpainting")


def by_task(count: int) -> TaskRecords:
    return TaskRecords(
        replace(record, task=TaskRecords.tasks[number % 2])
        for number, record in enumerate(random_records(count))
    )


def measure(records: Records, **others: Any) -> dict[str, float]:
    model = tiny_transformer()
    given: dict[str, Any] = {
        "quantiles": 2,
        "max_records": 99,
        "seed": 3,
        "exclude_refs": False,
        "device": torch.device("cpu"),
        "interval": interval_of,
    }
    schedule = trainer(model, training(), records).step.schedule
    return held_out_loss(model, records, schedule, **{**given, **others})


def test_held_out_loss_is_reported_for_each_task_and_timestep() -> None:
    records = by_task(14)
    found = measure(records)
    steps = [name for name in found if name.startswith("validation/timestep_") and name.count("/") == 1]
    assert len(steps) == 2
    halves = [f"validation/task/{task}/loss" for task in TaskRecords.tasks]
    assert sum(found[name] for name in halves) / 2 == pytest.approx(found["validation/loss"])
    for step in steps:
        each = [
            found[f"validation/task/{task}/{step.removeprefix('validation/')}"] for task in TaskRecords.tasks
        ]
        assert sum(each) / 2 == pytest.approx(found[step])
    for name in ("validation/loss", *steps, *halves):
        assert found[f"{name}/low"] < found[name] < found[f"{name}/high"]


def test_held_out_tasks_have_the_names_of_training(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "tasks:\n  plain: {task: gray}\n  wide: {task: outpainting_inner}\n  canny: {}\n"
        "  small: {task: inpainting_random}\n  large: {task: inpainting_random}\n"
    )
    job: Any = SimpleNamespace(raw_clips=SimpleNamespace(synthesis=str(recipe)))
    called = names_of_tasks(job, ("gray", "wide"))
    assert {
        task: called.get(task, task) for task in ("gray", "outpainting_inner", "inpainting_random", "x")
    } == {
        "gray": "plain",
        "outpainting_inner": "outpainting_inner",  # `wide` is a held-out task itself
        "inpainting_random": "inpainting_random",  # of two entries
        "x": "x",
    }
    found = measure(by_task(4), task_labels={TaskRecords.tasks[0]: "plain"})
    assert {name.split("/")[2] for name in found if name.startswith("validation/task/")} == {
        "plain",
        TaskRecords.tasks[1],
    }


def test_interval_matches_the_records_losses() -> None:
    seen: list[list[float]] = []

    def interval(losses: Any) -> tuple[float, float] | None:
        seen.append(list(losses))
        return interval_of(losses)

    found = measure(random_records(8), interval=interval)
    assert len(seen) == 3  # two timesteps, and both
    assert sum(seen[-1]) / 8 == pytest.approx(found["validation/loss"])
    expected = mean_of(seen[-1], rounds=2000)
    assert (found["validation/loss/low"], found["validation/loss/high"]) == (expected.low, expected.high)


def test_few_records_have_no_interval() -> None:
    assert not [name for name in measure(random_records(3)) if name.endswith(("/low", "/high"))]


def test_log_line_is_unchanged_and_tasks_have_their_own() -> None:
    values = {
        "validation/timestep_380": 0.5,
        "validation/loss": 0.25,
        "validation/task/gray/timestep_380": 0.1,
        "validation/task/gray/loss": 0.125,
        "validation/task/gray/loss/low": 0.1,
        "validation/task/gray/loss/high": 0.2,
        "validation/loss/low": 0.2,
    }
    assert held_out_lines(values) == (
        "timestep_380: 5.000000E-01 | loss: 2.500000E-01",
        "gray: 1.250000E-01 [1.000E-01, 2.000E-01]",
    )
    assert held_out_lines({"validation/loss": 0.25}) == ("loss: 2.500000E-01", "")


@pytest.fixture
def group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_with_losses(folder: Path, losses: list[float], **checkpoint: Any) -> Recorder:
    """An iteration and an evaluation for each loss."""
    config = training(
        batch={"train_iters": len(losses)},
        eval={"eval_interval": 1},
        checkpoint={"save": str(folder), "save_best": True, **checkpoint},
    )
    keeper = Checkpointer(
        CheckpointConfig(save=str(folder), save_best=True, **checkpoint),
        CPU,
        KEY_MAPS["mm"],
        base=None,
        job_json="{}",
    )
    left = iter(losses)
    recorder = Recorder()
    run = trainer(
        tiny_transformer(),
        config,
        evaluate=lambda: {"validation/loss": next(left)},
        checkpoints=keeper,
        writers=[recorder],
    )
    run.run()
    return recorder


@pytest.mark.usefixtures("group")
def test_best_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "save"
    run_with_losses(folder, [0.5, 0.3, 0.4, float("nan"), 0.6])
    assert read_best(folder) == Best(iteration=2, loss=0.3, alone=True)
    assert saved_iterations(folder) == [2, 5]  # the best one, and the last


@pytest.mark.usefixtures("group")
def test_best_checkpoint_outlives_the_retain_interval(tmp_path: Path) -> None:
    folder = tmp_path / "save"
    run_with_losses(folder, [0.5, 0.3, 0.4, 0.4, 0.4], save_interval=1, save_retain_interval=4)
    assert saved_iterations(folder) == [2, 4, 5]
    assert read_best(folder) == Best(iteration=2, loss=0.3, alone=False)


@pytest.mark.usefixtures("group")
def test_best_checkpoint_at_the_end_of_a_run_stays(tmp_path: Path) -> None:
    folder = tmp_path / "save"
    run_with_losses(folder, [0.5, 0.3])
    assert read_best(folder) == Best(iteration=2, loss=0.3, alone=False)


def test_best_of_a_folder_that_is_missing_is_none(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    (tmp_path / BEST).write_text(json.dumps({"iteration": 3, "loss": 0.5}))
    assert read_best(tmp_path) is None
    (tmp_path / BEST).write_text("{}")
    with raises(WeightsError, "iteration", where=tmp_path / BEST):
        read_best(tmp_path)


def test_validation_videos_are_scored_like_any_others(tmp_path: Path) -> None:
    write_official(tmp_path / "tiny")
    config = {
        "model": {"transformer": "unused while training", "vae": "tiny", "text_encoder": "tiny"},
        "output_path": str(tmp_path / "unused"),
        "tasks": [{"prompt": "a red ball"}],
        **{"height": 32, "width": 48, "num_frames": 5, "steps": 1, "dtype": "fp32"},
    }
    (tmp_path / "inference.json").write_text(json.dumps(config))
    mesh: Any = SimpleNamespace(world_size=1, cp_size=1)
    videos = ValidationVideos(
        tmp_path / "inference.json",
        tiny_transformer(),
        mesh,
        Accelerator.detect("cpu"),
        tmp_path / "videos",
        score=True,
    )
    found = videos(10)
    report = read_report(tmp_path / "videos/iter_0000010/eval.json")
    assert found["validation/videos/flicker"] == report.samples[0].scores["flicker"]
    assert all(name.startswith("validation/videos/") for name in found)


def test_scores_of_videos_reach_the_writers() -> None:
    recorder, config = Recorder(), training(batch={"train_iters": 2}, eval={"eval_interval": 2})
    run = trainer(
        tiny_transformer(),
        config,
        writers=[recorder],
        videos=lambda iteration: {"validation/videos/seam": 2.0},
    )
    run.run()
    assert (2, {"validation/videos/seam": 2.0}) in recorder.rows


def test_videos_without_scores_write_no_record() -> None:
    recorder, config = Recorder(), training(batch={"train_iters": 2}, eval={"eval_interval": 2})
    run = trainer(tiny_transformer(), config, writers=[recorder], videos=lambda iteration: {})
    run.run()
    assert all(values for _, values in recorder.rows)
