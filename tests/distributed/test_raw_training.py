"""Training on raw clips.

The numbers of extracted features, whatever the ranks and stops; tasks drawn by the recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.tasks.extract import main as extract
from tests.support.extract_job import make_job
from tests.support.runs import arguments, make_run, train_job, write_json

RECIPE = {
    "seed": 3,
    "tasks": {
        "inpainting_random": {"weight": 2, "loss_weight": 2, "options": {"references": {"integers": [0, 1]}}},
        "framerefext": {"shift": 2},
        "gray": {},
    },
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """A training environment, and a folder with raw clips, models and their features."""
    root = tmp_path_factory.mktemp("raw")
    extract([*make_job(root / "clips", num_frames=5), "--no-check-clips", "--num-workers=0"])
    environment = make_run(root / "run")
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    parts = json.loads((root / "clips" / "model.json").read_text())
    raw_model = write_json(root / "raw_model.json", {**model, **parts})
    return {**environment, "RAW_MODEL": str(raw_model)}, root / "clips"


def raw_flags(job: tuple[dict[str, str], Path], folder: Path, *more: str, **flags: Any) -> list[str]:
    environment, clips = job
    folder.mkdir(exist_ok=True)
    data = json.loads((clips / "data.json").read_text())
    if recipe := flags.pop("recipe", None):
        data["dataset_param"]["synthesis"] = str(write_json(folder / "recipe.yaml", recipe))
    data["dataset_param"]["validation"] = {"data_path": str(clips / "out" / "data.jsonl")}
    files = {"MM_DATA": str(write_json(folder / "raw.json", data)), "MM_MODEL": environment["RAW_MODEL"]}
    return arguments({**environment, **files}, *more, **{"save": folder / "save", "train_iters": 4, **flags})


def steps(rows: list[dict[str, Any]], key: str = "loss") -> list[float]:
    return [row[key] for row in rows if key in row]


def test_raw_clips_train_as_their_features_do(world, job, tmp_path):
    environment, clips = job
    basic = {"data_path": str(clips / "out" / "data.jsonl")}
    features = {"dataset_param": {"dataset_type": "feature", "basic_parameters": basic}}
    files = {**environment, "MM_DATA": str(write_json(tmp_path / "features.json", features))}
    flags = arguments(files, save=tmp_path / "features", train_iters=4)
    (expected,) = world.run(1, train_job, flags)
    (found,) = world.run(1, train_job, raw_flags(job, tmp_path / "raw", eval_interval=4))
    assert steps(found) == steps(expected)
    assert len(steps(found)) == 4
    assert len(steps(found, "validation/loss")) == 1
    assert sum(steps(found, "seconds/vae")) > 0


@pytest.fixture(scope="module")
def alone(world, job, tmp_path_factory):
    """The rows of a run by the recipe on one rank."""
    return world.run(1, train_job, raw_flags(job, tmp_path_factory.mktemp("alone"), recipe=RECIPE))[0]


def test_raw_training_resumes_where_it_stopped(world, job, alone, tmp_path):
    flags = {"recipe": RECIPE, "save_interval": 2}
    world.run(1, train_job, raw_flags(job, tmp_path / "part", train_iters=2, **flags))
    resumed = raw_flags(job, tmp_path / "part", load=tmp_path / "part" / "save", **flags)
    (rest,) = world.run(1, train_job, resumed)
    assert steps(rest) == steps(alone)
    assert len({round(loss, 6) for loss in steps(alone)}) == 4


def test_raw_training_is_equal_on_two_ranks(world, job, alone, tmp_path):
    together = world.run(2, train_job, raw_flags(job, tmp_path / "2", recipe=RECIPE))[-1]
    assert steps(together) == pytest.approx(steps(alone), rel=1e-6)
    groups = [key for row in alone for key in row if key.startswith("loss/")]
    assert {key for key in groups if "task" in key} <= {
        "loss/task/inpainting_random",
        "loss/task/framerefext",
        "loss/task/gray",
        "loss/task/given",
    }
    for key in groups:
        assert steps(together, key) == pytest.approx(steps(alone, key), rel=1e-5)
