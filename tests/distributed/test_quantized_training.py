"""Training with frozen 8-bit weights: equal on any number of ranks, resumed exactly, and never saved."""

from __future__ import annotations

import json

import pytest
import torch

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.lora.saved import DOWN, UP
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from tests.distributed.test_lora_training import (
    _names,
    _tensors,
    assert_close,
    losses,
    refusal,
    train,
    with_transforms,
)
from tests.support.errors import raises
from tests.support.runs import arguments, make_run, train_job
from tests.support.tiny import TINY

LORA = ("--lora-rank=4", "--lora-alpha=8", "--lora-on=both")
INT8 = (*LORA, "--quantize=int8")
BLOCKS = TINY.trunk.num_layers + len(TINY.vace_layers)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def alone(world, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(world, environment, folder, *INT8)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, {}), (4, {"set": "fsdp2.sharding_size=2"}), (2, {"context_parallel_size": 2, **FULL})],
    ids=["fsdp", "hsdp", "context-parallel"],
)
def test_8_bit_training_matches_across_ranks(world, environment, alone, tmp_path, ranks, flags):
    rows = train(world, environment, tmp_path, *INT8, "--no-save-optim", ranks=ranks, **flags)
    assert losses(rows) == pytest.approx(losses(alone[1]), rel=1e-5)
    assert_close(open_weights(tmp_path), open_weights(alone[0]), atol=1e-5)


def compiled_job(argv):
    """One block of each kind is traced as for any device, without the last stage, which needs a compiler."""
    whole, made = torch.compile, []

    def traced(function):
        made.append(function)
        return whole(function, backend="aot_eager") if len(made) in (1, BLOCKS) else function

    torch.compile = traced
    try:
        return train_job(argv), len(made)
    finally:
        torch.compile = whole


def test_compiled_lora_on_8_bits_trains_identically(world, environment, alone, tmp_path):
    flags = {"save": tmp_path, "train_iters": 2, "set": "fsdp2.compile=true"}
    (found,) = world.run(1, compiled_job, arguments(environment, *INT8, "--no-save-optim", **flags))
    rows, blocks = found
    assert blocks == BLOCKS
    assert losses(rows) == pytest.approx(losses(alone[1])[:2], rel=1e-5)


@pytest.fixture(scope="module")
def exact(world, environment, tmp_path_factory):
    return train(world, environment, tmp_path_factory.mktemp("exact"), *LORA, train_iters=2)


@pytest.mark.parametrize(("form", "bound"), [("int8", 1e-2), ("fp8", 3e-2)])
def test_loss_matches_the_exact_base(world, environment, exact, tmp_path, form, bound):
    found = train(world, environment, tmp_path / form, *LORA, f"--quantize={form}", ranks=2, train_iters=2)
    assert losses(found) == pytest.approx(losses(exact), rel=bound)
    assert losses(found) != losses(exact)


def test_checkpoint_holds_the_lora_and_names_the_format(alone):
    state = read_dcp(alone[0] / "iter_0000004")
    assert all(name.endswith((DOWN, UP)) for name in _names(state["model"]))
    assert json.loads(state["quantized"]) == {"int8": 60}
    open_weights(alone[0])  # its base, with the LoRA


def test_training_on_8_bits_resumes_bit_for_bit(world, environment, alone, tmp_path):
    train(world, environment, tmp_path, *INT8, train_iters=2)
    rows = train(world, environment, tmp_path, *INT8, load=tmp_path)
    assert losses(rows)[-2:] == losses(alone[1])[-2:]
    first, second = (_tensors(read_dcp(f / "iter_0000004")["model"]) for f in (tmp_path, alone[0]))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("flags", [LORA, (*LORA, "--quantize=fp8")])
def test_another_format_is_rejected_when_resuming(world, environment, alone, flags):
    (message,) = world.run(1, refusal, arguments(environment, *flags, load=alone[0], save=alone[0]))
    assert "60 layers in int8" in message
    assert "--finetune" in message


def test_branch_trains_on_8_bits_and_is_saved_alone(world, environment, tmp_path):
    branch = with_transforms(environment, tmp_path, trainable="branch")
    exact = train(world, branch, tmp_path / "exact", "--no-save-optim", train_iters=2)
    rows = train(world, branch, tmp_path / "run", "--quantize=int8", ranks=2, train_iters=2)
    assert losses(rows) == pytest.approx(losses(exact), rel=1e-2)
    state = read_dcp(tmp_path / "run/iter_0000002")
    assert all(name.startswith("vace_dit.") for name in _names(state["model"]))
    assert json.loads(state["quantized"]) == {"int8": 40}


def test_whole_checkpoints_are_rejected_next_to_8_bits(environment, tmp_path):
    with raises(ConfigError, "8-bit", "mm_to_hf", where="pretrain_vace.py: --save-full-model"):
        PretrainJob.from_argv(arguments(environment, *INT8, "--save-full-model"))
    none = with_transforms(environment, tmp_path, from_pretrained=None)
    with raises(ConfigError, "predictor.from_pretrained"):
        PretrainJob.from_argv(arguments(none, *INT8))
    everything = with_transforms(environment, tmp_path, trainable="all")
    with raises(ConfigError, "frozen"):
        PretrainJob.from_argv(arguments(everything, "--quantize=int8"))
