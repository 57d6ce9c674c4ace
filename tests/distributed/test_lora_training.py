"""Training a LoRA: the same on any number of ranks, resumed exactly, saved without its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.containers.dcp import read_dcp
from mindspeed_mm.models.lora.adapter import merged
from mindspeed_mm.models.lora.read import open_lora
from mindspeed_mm.models.lora.saved import DOWN, UP
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import raises
from tests.support.lora_files import lora_matrices, write_lora
from tests.support.runs import arguments, make_run, train_job
from tests.support.tiny import tiny_transformer, write_transformer

LORA = ("--lora-rank=4", "--lora-alpha=8", "--lora-on=both")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lora"))


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


def train(world, environment, folder, *more, ranks=1, **flags):
    flags = {"save": folder, "save_interval": 2, "train_iters": 4, **flags}
    return world.run(ranks, train_job, arguments(environment, *(more or LORA), **flags))[-1]


@pytest.fixture(scope="module")
def alone(world, environment, tmp_path_factory):
    """A run of four iterations on one rank: its folder and its rows."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(world, environment, folder)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, {}),
        (4, {"set": "fsdp2.sharding_size=2"}),
        (2, {"context_parallel_size": 2}),
        (2, FULL),
        (2, {"recompute_granularity": "selective"}),
    ],
    ids=["fsdp", "hsdp", "context-parallel", "recompute", "recompute-selective"],
)
def test_lora_training_matches_across_ranks(world, environment, alone, tmp_path, ranks, flags):
    rows = train(world, environment, tmp_path, *LORA, "--no-save-optim", ranks=ranks, **flags)
    assert losses(rows) == pytest.approx(losses(alone[1]), rel=1e-5)
    assert_close(open_weights(tmp_path), open_weights(alone[0]), atol=1e-5)


def test_caption_dropout_matches_across_ranks(world, environment, alone, tmp_path):
    flags = {"set": "model.caption_dropout=0.5"}
    one = train(world, environment, tmp_path / "one", *LORA, "--no-save-optim", **flags)
    two = train(world, environment, tmp_path / "two", *LORA, "--no-save-optim", ranks=2, **flags)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(one) != losses(alone[1])


def test_lora_trains_on_a_frozen_bf16_base(world, environment, alone, tmp_path):
    flags = {"fsdp2_config_path": tmp_path / "fsdp2.yaml", "lr": 1e-2}
    text = Path(environment["FSDP2_CONFIG"]).read_text()
    flags["fsdp2_config_path"].write_text(text.replace("param_dtype: fp32", "param_dtype: bf16"))
    changed = with_transforms(environment, tmp_path, dtype="bf16")
    rows = train(world, changed, tmp_path / "run", *LORA, "--bf16", ranks=2, **flags)
    assert losses(rows)[0] == pytest.approx(losses(alone[1])[0], rel=1e-2)
    state = read_dcp(tmp_path / "run/iter_0000004")
    assert {tensor.dtype for tensor in _tensors(state["model"]).values()} == {torch.float32}
    ups = [tensor for name, tensor in _tensors(state["model"]).items() if name.endswith(UP)]
    assert all(tensor.abs().max() > 1e-3 for tensor in ups)


def test_lora_moves_and_its_base_does_not(environment, alone):
    folder, rows = alone
    base = base_of(environment)
    trained = open_weights(folder)
    moved = {name for name in base.tensors if not torch.equal(base.read(name), trained.read(name))}
    assert moved == {f"{name}.weight" for name in lora_matrices()}
    assert len(set(losses(rows))) > 1


def test_checkpoint_holds_the_lora_and_names_its_base(environment, alone):
    state = read_dcp(alone[0] / "iter_0000004")
    names = _names(state["model"])
    assert len(names) == 2 * len(lora_matrices())
    assert all(name.endswith((DOWN, UP)) for name in names)
    assert Path(state["base"]["path"]).parent.name == "weights"
    scales = json.loads(state["adapter"])["scales"]
    assert scales == dict.fromkeys(lora_matrices(), 2.0)


def _names(values, prefix=""):
    found = []
    for key, value in values.items():
        found += _names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def test_resumed_lora_equals_one_that_never_stopped(world, environment, alone, tmp_path):
    train(world, environment, tmp_path, train_iters=2)
    rows = train(world, environment, tmp_path, load=tmp_path)
    assert losses(rows)[-2:] == losses(alone[1])[-2:]
    first, second = (read_dcp(folder / "iter_0000004") for folder in (tmp_path, alone[0]))
    for name, tensor in _tensors(first["model"]).items():
        assert torch.equal(tensor, _tensors(second["model"])[name]), name


def _tensors(values, prefix=""):
    found = {}
    for key, value in values.items():
        found |= (
            _tensors(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value.read()}
        )
    return found


def test_dcp_to_torch_keeps_the_lora_with_its_base(alone, tmp_path):
    from checkpoint.config import DcpToTorchConfig
    from checkpoint.dcp import gather

    gather(DcpToTorchConfig(source_path=str(alone[0]), target_path=str(tmp_path / "lora.pt")))
    one, other = open_weights(tmp_path / "lora.pt"), open_weights(alone[0])
    assert_close(one, other, atol=0)
    dcp_to_torch_save(alone[0] / "iter_0000004", tmp_path / "torch.pt")  # torch's own tool
    assert_close(open_weights(tmp_path / "torch.pt"), other, atol=0)


def test_whole_checkpoint_of_a_lora_needs_no_base(world, environment, alone, tmp_path):
    train(world, environment, tmp_path, *LORA, "--save-full-model")
    assert "base" not in read_dcp(tmp_path / "iter_0000004")
    one, other = open_weights(tmp_path), open_weights(alone[0])
    for name in other.tensors:
        assert torch.equal(one.read(name), other.read(name)), name


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (("--lora-rank=4", "--lora-alpha=4", "--lora-on=both"), ["scale 2", "has 1"]),
        (("--lora-rank=2", "--lora-alpha=4", "--lora-on=both"), ["[2, ", "[4, ", "rank"]),
        (("--lora-rank=4", "--lora-alpha=8", "--lora-on=trunk"), ["60 layers", "on 40", "vace_blocks."]),
        ((), ["60 layers", "--lora-rank", "predictor.from_pretrained"]),
    ],
    ids=["alpha", "rank", "part", "none"],
)
def test_another_lora_is_rejected_when_resuming(world, environment, alone, flags, facts):
    argv = arguments(environment, *flags, load=alone[0], save=alone[0])
    (message,) = world.run(1, refusal, argv)
    assert str(alone[0] / "iter_0000004") in message
    for fact in facts:
        assert fact in message


def test_lora_does_not_resume_a_branch(world, environment, tmp_path):
    branch = with_transforms(environment, tmp_path, trainable="branch")
    train(world, branch, tmp_path / "run", "--no-save-rng", train_iters=1)
    argv = arguments(branch, *LORA, load=tmp_path / "run", save=tmp_path / "run")
    (message,) = world.run(1, refusal, argv)
    assert "no LoRA" in message
    upon = with_transforms(environment, tmp_path, from_pretrained=str(tmp_path / "run"))
    rows = train(world, upon, tmp_path / "lora", *LORA, train_iters=1)
    state = read_dcp(tmp_path / "lora/iter_0000001")
    assert len(losses(rows)) == 1
    assert all(name.endswith((DOWN, UP)) for name in _names(state["model"]))
    open_weights(tmp_path / "lora")  # the LoRA, upon a branch, upon the published weights


def test_lora_of_another_base_is_rejected(world, environment, alone, tmp_path):
    other = tmp_path / "other weights"
    write_transformer(other, tiny_transformer(7), torch.float32)
    changed = with_transforms(environment, tmp_path, from_pretrained=str(other))
    argv = arguments(changed, *LORA, load=alone[0], save=alone[0])
    (message,) = world.run(1, refusal, argv)
    assert "fingerprint" in message
    assert str(other) in message
    with raises(WeightsError, other):
        open_weights(alone[0], base_path=other)
    moved = tmp_path / "moved"
    write_transformer(moved, tiny_transformer(), torch.float32)
    assert_close(open_weights(alone[0], base_path=moved), open_weights(alone[0]), atol=0)


def refusal(argv):
    try:
        train_job(argv)
    except WeightsError as error:
        return str(error)
    return "trained"


def test_matrices_of_a_lora_step_by_adamw_under_muon(world, environment, alone, tmp_path):
    rows = train(world, environment, tmp_path, *LORA, optimizer="muon")
    assert losses(rows) == losses(alone[1])


def with_transforms(environment, folder, *transforms, **predictor):
    """The environment with these transforms and keys of `predictor` in its model JSON."""
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    model["predictor"] |= predictor
    path = folder / "model.json"
    path.write_text(json.dumps({**model, "transforms": transforms}))
    return {**environment, "MM_MODEL": str(path)}


def base_of(environment):
    return open_weights(Path(environment["SAVE_PATH"]).parent / "weights")


def assert_close(first, second, atol=1e-6):
    for name in second.tensors:
        assert torch.allclose(first.read(name), second.read(name), atol=atol), name


STILL = {"lr": 1e-12, "train_iters": 2}  # what training starts from


@pytest.mark.parametrize("dialect", ["peft", "kohya"])
def test_training_continues_from_a_lora_of_any_dialect(world, environment, tmp_path, dialect):
    path = write_lora(dialect, tmp_path, lora_matrices())
    lora = {"type": "lora", "rank": 4, "alpha": 8, "on": "both", "init_from": str(path)}
    changed = with_transforms(environment, tmp_path, lora)
    train(world, changed, tmp_path / "run", "--no-save-optim", **STILL)
    base = base_of(environment)
    expected = merged(base, [(open_lora(path, base.shapes), 1.0)])
    assert_close(open_weights(tmp_path / "run"), expected)


def test_training_continues_from_a_checkpoint_of_a_lora(world, environment, tmp_path):
    lora = {"type": "lora", "rank": 4, "on": "branch", "modules_to_save": ["vace_patch_embedding"]}
    first = with_transforms(environment, tmp_path, {**lora, "rslora": True})
    train(world, first, tmp_path / "first", "--no-save-optim", train_iters=2, ranks=2)
    second = with_transforms(environment, tmp_path, {**lora, "init_from": str(tmp_path / "first")})
    train(world, second, tmp_path / "second", "--no-save-optim", ranks=2, **STILL)
    before, after = open_weights(tmp_path / "first"), open_weights(tmp_path / "second")
    assert_close(after, before)
    name = "vace_patch_embedding.weight"
    assert not torch.equal(before.read(name), base_of(environment).read(name))


def test_fused_lora_is_part_of_the_base(world, environment, tmp_path):
    path = write_lora("comfyui-alpha", tmp_path, lora_matrices())
    fuse = {"type": "fuse_lora", "path": str(path), "strength": 0.5}
    changed = with_transforms(environment, tmp_path, fuse, {"type": "lora", "rank": 2, "on": "both"})
    rows = train(world, changed, tmp_path / "run", ranks=2, **STILL)
    base = base_of(environment)
    expected = merged(base, [(open_lora(path, base.shapes), 0.5)])
    found = open_weights(tmp_path / "run")
    assert_close(found, expected)
    state = read_dcp(tmp_path / "run/iter_0000002")
    assert all(name.endswith((DOWN, UP)) for name in _names(state["model"]))
    whole = with_transforms(environment, tmp_path, from_pretrained=str(tmp_path / "run"), trainable="all")
    assert losses(train(world, whole, tmp_path / "again", train_iters=1, lr=1e-12)) == pytest.approx(
        losses(rows)[:1], rel=1e-5
    )
    resumed = with_transforms(environment, tmp_path, {"type": "lora", "rank": 2, "on": "both"})
    (message,) = world.run(1, refusal, arguments(resumed, load=tmp_path / "run", save=tmp_path / "run"))
    assert "fused" in message
    path.unlink()
    with raises(WeightsError, path, where=tmp_path / "run/iter_0000002"):
        open_weights(tmp_path / "run")


def test_branch_trains_on_a_trunk_with_a_fused_lora(world, environment, tmp_path):
    path = write_lora("diffsynth", tmp_path, lora_matrices("blocks"))
    fuse = {"type": "fuse_lora", "path": str(path)}
    changed = with_transforms(environment, tmp_path, fuse, trainable="branch")
    train(world, changed, tmp_path / "run", "--no-save-optim", train_iters=2, ranks=2)
    base, found = base_of(environment), open_weights(tmp_path / "run")
    expected = merged(base, [(open_lora(path, base.shapes), 1.0)])
    for name in base.tensors:
        assert torch.equal(found.read(name), expected.read(name)) == (not name.startswith("vace_")), name


def test_dropout_draws_the_same_numbers_when_recomputed(world, environment, tmp_path):
    lora = {"type": "lora", "rank": 4, "on": "both", "dropout": 0.5}
    changed = with_transforms(environment, tmp_path, lora)
    plain = train(world, changed, tmp_path / "plain", train_iters=3)
    for how in ("full", "selective"):
        flags = {"recompute_granularity": how, "train_iters": 3}
        flags |= {"recompute_method": "uniform"} if how == "full" else {}
        assert losses(train(world, changed, tmp_path / how, **flags)) == losses(plain)
    train(world, changed, tmp_path / "half", train_iters=2)
    resumed = train(world, changed, tmp_path / "half", train_iters=3, load=tmp_path / "half")
    assert losses(resumed)[-1] == losses(plain)[-1]


def test_bad_lora_settings_are_rejected_before_anything_loads(environment, tmp_path):
    from mindspeed_mm.tasks.jobs.pretrain import PretrainJob

    with raises(ConfigError, "--lora-rank", "no LoRA"):
        PretrainJob.from_argv(arguments(environment, "--lora-alpha=4"))
    model = json.loads(Path(environment["MM_MODEL"]).read_text())
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model | {"transforms": [{"type": "lora", "match": ["self_attn.qq"]}]}))
    with raises(ConfigError, "self_attn.qq"):
        PretrainJob.from_argv(arguments({**environment, "MM_MODEL": str(path)}))


@pytest.mark.parametrize("target", ["peft", "comfyui.safetensors", "diffusers.safetensors"])
def test_run_becomes_a_lora_of_other_programs(environment, alone, tmp_path, target):
    from checkpoint.config import LoraToConfig
    from checkpoint.lora import write_comfyui, write_diffusers, write_peft
    from mindspeed_mm.models.lora.adapter import merged
    from mindspeed_mm.models.weights import open_adapter

    write = {"peft": write_peft, "comfyui.safetensors": write_comfyui}.get(target, write_diffusers)
    write(LoraToConfig(source_path=str(alone[0]), target_path=str(tmp_path / target)))
    base = open_weights(Path(environment["SAVE_PATH"]).parent / "weights")
    found = merged(base, [(open_adapter(tmp_path / target, base.shapes), 1.0)])
    trained = open_weights(alone[0])
    for name in base.tensors:
        assert torch.allclose(found.read(name), trained.read(name), atol=1e-6), name
