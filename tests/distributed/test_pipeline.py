"""Training in pipeline stages gives the numbers of training without them, and checkpoints that any layout reads."""

import json
from pathlib import Path

import pytest
import torch

from mindspeed_mm.models.weights import open_weights
from tests.runs import arguments, make_run, train_job, write_json

PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    found = {}
    for trainable in ("branch", "trunk", "all"):
        run = make_run(tmp_path_factory.mktemp(trainable), predictor={"trainable": trainable})
        data = json.loads(Path(run["MM_DATA"]).read_text())
        found[trainable] = {**run, "MM_DATA": str(write_json(Path(run["MM_DATA"]), data))}
    return found


def trained(world, environment, folder, ranks, **flags):
    """→ the rows of the metrics, and the weights that were saved."""
    given = {"train_iters": 3, "save": folder, "eval_interval": 3, **flags}
    rows = world.run(ranks, train_job, arguments(environment, "--save-full-model", **given))[-1]
    source = open_weights(Path(folder) / f"iter_{given['train_iters']:07d}")
    return rows, {name: source.read(name).clone() for name in source.tensors}


def assert_alike(found, wanted):
    for key in ("loss", "grad_norm", "validation/loss", "tokens"):
        values = [[row[key] for row in rows if key in row] for rows in (found[0], wanted[0])]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
        assert values[1], key
    for name, weight in wanted[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("trainable", ["branch", "trunk", "all"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_two_stages_equal_one(world, environments, tmp_path, trainable, schedule):
    alone = trained(world, environments[trainable], str(tmp_path / "1"), 1)
    staged = trained(world, environments[trainable], str(tmp_path / "2"), 2, pipeline_schedule=schedule, **PP2)
    assert_alike(staged, alone)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, {"virtual_pipeline_model_parallel_size": 2}),
        (4, {}),
        (4, {"context_parallel_size": 2}),
    ],
    ids=["virtual", "data", "context"],
)
def test_stages_go_with_other_parallelism(world, environments, tmp_path, ranks, flags):
    alone = trained(world, environments["all"], str(tmp_path / "1"), 1)
    staged = trained(world, environments["all"], str(tmp_path / "2"), ranks, **PP2, **flags)
    assert_alike(staged, alone)


def test_a_run_in_stages_goes_on_exactly(world, environments, tmp_path):
    at_once = trained(world, environments["all"], str(tmp_path / "once"), 2, **PP2)
    half = str(tmp_path / "half")
    trained(world, environments["all"], half, 2, train_iters=2, lr_decay_iters=3, **PP2)
    rows, weights = trained(world, environments["all"], half, 2, load=half, **PP2)
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in at_once[0] if "loss" in row]
    for name, weight in at_once[1].items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_moves_between_layouts_to_the_bit(world, environments, tmp_path, before, after):
    stages = {1: {}, 2: PP2}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    _, saved = trained(world, environments["all"], first, before, **stages[before])
    moved = {"load": first, "lr": 1e-30, "weight_decay": 0.0, "train_iters": 4}
    _, again = trained(world, environments["all"], second, after, **moved, **stages[after])
    for name, weight in saved.items():
        assert torch.equal(again[name], weight), name
