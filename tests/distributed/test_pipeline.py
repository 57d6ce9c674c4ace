"""Training in pipeline stages gives the numbers of one rank; any layout reads its checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from checkpoint.cli import main as convert
from mindspeed_mm.models.weights import open_weights
from tests.support.runs import arguments, make_run, train_job, write_json

PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return the environment of a job, by the part of the model that it trains."""
    made = {}

    def make(trainable, **predictor):
        key = (trainable, str(predictor))
        if key not in made:
            folder = tmp_path_factory.mktemp(trainable)
            made[key] = make_run(folder, predictor={"trainable": trainable, **predictor})
        return made[key]

    return make


def trained(world, environment, folder, ranks, **flags):
    """Return the rows of the metrics and the saved weights."""
    given = {"train_iters": 3, "save": str(folder), "eval_interval": 3, **flags}
    rows = world.run(ranks, train_job, arguments(environment, "--save-full-model", **given))[-1]
    source = open_weights(Path(folder) / f"iter_{given['train_iters']:07d}")
    return rows, {name: source.read(name).clone() for name in source.tensors}


@pytest.fixture(scope="module")
def alone(world, environment, tmp_path_factory):
    """Return the result of a job on one rank without stages."""
    made = {}

    def run(trainable):
        if trainable not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[trainable] = (*trained(world, environment(trainable), folder, 1), folder)
        return made[trainable]

    return run


@pytest.fixture(scope="module")
def staged(world, environment, tmp_path_factory):
    """What two stages make of the whole model: rows, weights, folder."""
    folder = tmp_path_factory.mktemp("staged")
    return (*trained(world, environment("all"), folder, 2, **PP2), folder)


def assert_alike(found, expected):
    for key in ("loss", "grad_norm", "validation/loss", "tokens"):
        values = [[row[key] for row in rows if key in row] for rows in (found[0], expected[0])]
        assert values[1], key
        assert values[0] == pytest.approx(values[1], rel=1e-5), key
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("trainable", "ranks", "flags"),
    [
        ("branch", 2, {}),
        ("trunk", 2, {}),
        ("all", 2, {"pipeline_schedule": "gpipe"}),
        ("all", 2, {"virtual_pipeline_model_parallel_size": 2}),
        ("all", 4, {}),
        ("all", 4, {"context_parallel_size": 2}),
        ("all", 4, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    ],
    ids=["branch", "trunk", "gpipe", "virtual", "data", "context", "ring"],
)
def test_stages_give_the_numbers_of_one_rank(world, environment, alone, tmp_path, trainable, ranks, flags):
    found = trained(world, environment(trainable), tmp_path, ranks, **PP2, **flags)
    assert_alike(found, alone(trainable))


def test_two_stages_that_train_everything_give_the_same(staged, alone):
    assert_alike(staged, alone("all"))


def test_uneven_stages_of_the_model_json_give_the_same(world, environment, alone, tmp_path):
    found = trained(world, environment("all", pipeline_num_layers=[1, 3]), tmp_path, 2, **PP2)
    assert_alike(found, alone("all"))


def test_run_in_stages_resumes_exactly(world, environment, staged, tmp_path):
    half = tmp_path / "half"
    trained(world, environment("all"), half, 2, train_iters=2, lr_decay_iters=3, **PP2)
    rows, weights = trained(world, environment("all"), half, 2, load=str(half), **PP2)
    assert [row["loss"] for row in rows if "loss" in row] == [
        row["loss"] for row in staged[0] if "loss" in row
    ]
    for name, weight in staged[1].items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_checkpoint_moves_between_layouts_bit_for_bit(
    world, environment, alone, staged, tmp_path, before, after
):
    _, saved, first = {1: alone("all"), 2: staged}[before]
    moved = {"load": str(first), "lr": 1e-30, "weight_decay": 0.0, "train_iters": 4}
    _, again = trained(world, environment("all"), tmp_path, after, **moved, **{1: {}, 2: PP2}[after])
    for name, weight in saved.items():
        assert torch.equal(again[name], weight), name


@pytest.mark.parametrize(
    ("layers", "flags"),
    [("[3,1]", {}), ("[[1,1],[1,1]]", {"virtual_pipeline_model_parallel_size": 2})],
    ids=["pp", "vpp"],
)
def test_converted_stages_train_and_convert_back(world, environment, alone, tmp_path, layers, flags):
    plain = environment("all")
    split = tmp_path / "split"
    weights = str(Path(plain["MM_MODEL"]).parent / "weights")
    paths = ["--cfg.source_path", weights, "--cfg.target_path", str(split)]
    convert(["VACEConverter", "hf_to_mm", *paths, "--pp_layers", layers])
    model = json.loads(Path(plain["MM_MODEL"]).read_text())
    model["predictor"]["from_pretrained"] = str(split)
    changed = {**plain, "MM_MODEL": str(write_json(tmp_path / "model.json", model))}
    found = trained(world, changed, tmp_path / "save", 2, **PP2, **flags)
    assert_alike(found, alone("all"))
    back = tmp_path / "back"
    paths = ["--cfg.source_path", str(tmp_path / "save"), "--cfg.target_path", str(back)]
    convert(["VACEConverter", "mm_to_hf", *paths])
    source = open_weights(back)
    for name, weight in found[1].items():
        assert torch.equal(source.read(name), weight), name
