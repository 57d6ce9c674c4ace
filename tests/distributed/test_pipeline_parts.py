"""Pipeline stages with LoRA, 8-bit weights, Muon and references; and a killed stage."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from mindspeed_mm.distributed.pipeline import Pipeline
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.weights import open_weights
from tests.distributed.test_pipeline import PP2, assert_alike, trained
from tests.support.loops import random_records
from tests.support.runs import arguments, make_run, train_job, write_features, write_json

LORA = ("--lora-rank=4", "--lora-on=both")
INT8 = (*LORA, "--quantize=int8")
VP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("parts"))


def run(world, environment, folder, ranks, *more, **flags):
    """Return the rows of the metrics, and the whole model with the trained weights."""
    given = {"train_iters": 3, "eval_interval": 3, "lr": 1e-2, **flags}
    rows = world.run(ranks, train_job, arguments(environment, *more, **{"save": str(folder), **given}))[-1]
    source = open_weights(Path(folder) / f"iter_{given['train_iters']:07d}")
    return rows, {name: source.read(name).clone() for name in source.tensors}


def with_model(environment, folder, name="model", **changes):
    """The environment with these keys of the model JSON; `predictor` is added to."""
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    model["predictor"] |= changes.pop("predictor", {})
    return {**environment, "MM_MODEL": str(write_json(folder / f"{name}.json", {**model, **changes}))}


@pytest.fixture(scope="module")
def alone(world, environment, tmp_path_factory):
    """Return the result of these flags on one rank without stages."""
    made = {}

    def train(*more):
        if more not in made:
            made[more] = run(world, environment, tmp_path_factory.mktemp("alone"), 1, *more)
        return made[more]

    return train


@pytest.mark.parametrize(
    ("more", "ranks", "flags"),
    [(LORA, 2, PP2), (LORA, 2, VP2), (LORA, 4, PP2), (INT8, 2, PP2)],
    ids=["lora", "virtual", "data", "int8"],
)
def test_adapter_in_stages_trains_as_on_one_rank(world, environment, alone, tmp_path, more, ranks, flags):
    assert_alike(run(world, environment, tmp_path, ranks, *more, **flags), alone(*more))


def test_lora_moves_from_stages_to_one_rank_and_back(world, environment, alone, tmp_path):
    folder = tmp_path / "save"
    run(world, environment, folder, 2, *LORA, **PP2, train_iters=1)
    run(world, environment, folder, 1, *LORA, train_iters=2, load=str(folder))
    assert_alike(run(world, environment, folder, 2, *LORA, **PP2, load=str(folder)), alone(*LORA))


def gradients_sent(argv):
    """Train inside a process group. Return the number of gradients sent to the previous stage."""
    sent = []
    make = PipelineStage.get_bwd_send_ops

    def counted(stage, chunk):
        operations = make(stage, chunk)
        sent.extend(operations)
        return operations

    with mock.patch.object(PipelineStage, "get_bwd_send_ops", counted):
        train_job(argv)
    return len(sent)


@pytest.mark.parametrize(("layer", "sent"), [("blocks.3.self_attn.q", 0), ("blocks.1.self_attn.q", 8)])
def test_frozen_stages_get_no_gradients(world, environment, alone, tmp_path, layer, sent):
    """Trunk tokens alone have one in front of block 2: four micro-batches, two iterations."""
    lora = {"type": "lora", "rank": 4, "on": "trunk", "match": [layer]}
    changed = with_model(environment, tmp_path, transforms=[lora])
    once = run(world, changed, tmp_path / "once", 1, train_iters=2)
    argv = arguments(changed, save=str(tmp_path / "save"), train_iters=2, lr=1e-2, **PP2)
    assert world.run(2, gradients_sent, argv) == [0, sent]
    rows = [json.loads(line) for line in (tmp_path / "save/metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows if "loss" in r] == pytest.approx(
        [r["loss"] for r in once[0] if "loss" in r], rel=1e-5
    )


@pytest.mark.parametrize("trainable", ["branch", "all"])
def test_muon_updates_match_where_a_stage_has_no_matrices(world, environment, tmp_path, trainable):
    """With `branch`, the last stage has nothing that trains."""
    stages = {"trainable": trainable, "pipeline_num_layers": [3, 1]}
    changed = with_model(environment, tmp_path, predictor={"trainable": trainable})
    split = with_model(environment, tmp_path, "stages", predictor=stages)
    flags = {"optimizer": "muon", "lr": 1e-3}
    once = trained(world, changed, tmp_path / "once", 1, **flags)
    folder = tmp_path / "stages"
    trained(world, split, folder, 2, **PP2, **flags, train_iters=2, lr_decay_iters=3)
    rows, weights = trained(world, split, folder, 2, **PP2, **flags, load=str(folder))
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(
        [row["loss"] for row in once[0] if "loss" in row], rel=1e-4
    )
    for name, weight in once[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4, msg=name)


def test_references_in_stages_give_the_same(world, environment, tmp_path):
    records = random_records(6, ((4, 4, 6), (3, 6, 2)))
    records[:] = [replace(record, num_refs=number % 2) for number, record in enumerate(records)]
    listing = write_features(tmp_path, records)
    basic = {"data_path": str(listing), "data_folder": str(listing.parent)}
    data = {"dataset_param": {"dataset_type": "feature", "basic_parameters": basic, "validation": basic}}
    changed = with_model(environment, tmp_path, predictor={"trainable": "all"})
    changed["MM_DATA"] = str(write_json(tmp_path / "data.json", data))
    once = trained(world, changed, tmp_path / "once", 1)
    assert_alike(trained(world, changed, tmp_path / "stages", 2, **PP2), once)


def train_and_die(argv, iteration):
    """Inside a process group: train, and end the last rank in the middle of `iteration`."""
    run_group = Pipeline.forward_backward
    started = []

    def die(pipeline, batches, loss):
        started.append(loss)

        def dying(velocity, number):
            if len(started) == iteration and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss(velocity, number)

        run_group(pipeline, batches, dying)

    with mock.patch.object(Pipeline, "forward_backward", die):
        train_job(argv)


def test_run_resumes_after_the_kill_of_a_stage(world, mortal_world, environment, tmp_path):
    changed = with_model(environment, tmp_path, predictor={"trainable": "all"})
    once = trained(world, changed, tmp_path / "once", 2, **PP2)
    half = str(tmp_path / "half")
    flags = {"save": half, "train_iters": 3, "eval_interval": 3, "save_interval": 1, **PP2}
    codes = mortal_world.run_to_death(2, train_and_die, arguments(changed, "--save-full-model", **flags), 3)
    assert codes[1] == -signal.SIGKILL
    rows, weights = trained(world, changed, half, 2, load=half, **PP2)
    last = [[row["loss"] for row in found if "loss" in row][-1] for found in (rows, once[0])]
    assert last[0] == last[1]
    for name, weight in once[1].items():
        assert torch.equal(weights[name], weight), name


def refusal(argv):
    """Inside a process group: what the job says before it trains."""
    try:
        train_job(argv)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_loras_of_validation_videos_are_rejected(world, environment, tmp_path):
    models = {name: str(tmp_path) for name in ("transformer", "vae", "text_encoder")}
    sizes = {"height": 32, "width": 48, "num_frames": 5, "steps": 2}
    (tmp_path / "a.safetensors").touch()
    loras = [{"path": str(tmp_path / "a.safetensors")}]
    config = {"model": models, "prompt": "a red ball", "loras": loras, "output_path": "out", **sizes}
    inference = write_json(tmp_path / "inference.json", config)
    data = json.loads(Path(environment["MM_DATA"]).read_text())
    data["dataset_param"]["validation"]["prompts"] = str(inference)
    changed = {**environment, "MM_DATA": str(write_json(tmp_path / "data.json", data))}
    (line, other) = world.run(2, refusal, arguments(changed, save=str(tmp_path / "save"), **PP2))
    assert line == other
    assert line.startswith(f"{inference}:loras: ")
    assert "pipeline stages" in line
