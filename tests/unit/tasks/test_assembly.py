"""Where a job's weights come from, which parts its model has, and what its checkpoints leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.pretrain import run
from tests.support.errors import raises
from tests.support.runs import arguments, make_run
from tests.support.tiny import TINY, tiny_transformer, write_transformer

pytestmark = pytest.mark.medium

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHIPPED = Path(__file__).resolve().parents[3] / "examples/vace/fsdp2_config.yaml"


def edit(environment: dict[str, str], **predictor: object) -> None:
    """Change `predictor` of the run's model JSON."""
    path = Path(environment["MM_MODEL"])
    values = json.loads(path.read_text())
    values["predictor"] |= predictor
    path.write_text(json.dumps(values))


def train(environment: dict[str, str], *more: str, **flags: object) -> dict[str, float]:
    """Run the job in this process. Return the first row of its metrics.jsonl."""
    job = PretrainJob.from_argv(arguments(environment, *more, train_iters=1, **flags), ranks=1)
    accelerator = Accelerator.detect("cpu")
    with launch(accelerator):
        run(job, accelerator)
    first = (Path(environment["SAVE_PATH"]) / "metrics.jsonl").read_text().splitlines()[0]
    return json.loads(first)


def dit(**more: object) -> dict[str, object]:
    return {"in_dim": TINY.vace_in_dim, "vace_layers": list(TINY.vace_layers), **more}


def test_trunk_without_branch_trains_with_the_shipped_yaml(tmp_path: Path) -> None:
    environment = make_run(tmp_path, dtype="bf16") | {"FSDP2_CONFIG": str(SHIPPED)}
    trunk = TINY.model_copy(update={"vace_layers": ()})
    write_transformer(tmp_path / "weights", tiny_transformer(0, trunk), torch.float32)
    edit(environment, vace_dit=dit(vace_layers=[]), trainable="trunk")
    assert train(environment)["loss"] > 0


def test_training_without_a_branch_is_rejected_early(tmp_path: Path) -> None:
    environment = make_run(tmp_path)
    edit(environment, vace_dit=dit(vace_layers=[]))
    with raises(ConfigError, "trainable", "branch", "trunk"):
        PretrainJob.from_argv(arguments(environment), ranks=1)


@pytest.mark.parametrize("alone", [True, False])
def test_vace_pretrained_gives_the_branch_and_only_the_branch(tmp_path: Path, alone: bool) -> None:
    environment = make_run(tmp_path)
    write_transformer(tmp_path / "other", tiny_transformer(5), torch.float32)
    branch = tmp_path / "other" / WEIGHTS
    other = load_file(branch)
    if alone:
        branch = tmp_path / "branch.safetensors"
        save_file({name: weight for name, weight in other.items() if name.startswith("vace_")}, branch)
    edit(environment, vace_dit=dit(vace_pretrained=str(branch)))
    train(environment, lr=1e-30)
    saved = open_weights(Path(environment["SAVE_PATH"]))  # completed from its base: the trunk's folder
    trunk = load_file(tmp_path / "weights" / WEIGHTS)
    for name in saved.shapes:
        wanted = other if name.startswith("vace_") else trunk
        assert torch.equal(saved.read(name), wanted[name]), name


def test_vace_pretrained_with_no_branch_in_it_is_named(tmp_path: Path) -> None:
    environment = make_run(tmp_path)
    trunk = TINY.model_copy(update={"vace_layers": ()})
    write_transformer(tmp_path / "trunk", tiny_transformer(0, trunk), torch.float32)
    edit(environment, vace_dit=dit(vace_pretrained=str(tmp_path / "trunk")))
    with raises(WeightsError, "VACE branch", where=tmp_path / "trunk"):
        train(environment)


@pytest.mark.parametrize(
    ("predictor", "fact"),
    [
        ({"vace_dit": dit(vace_pretrained="/w", init_from_trunk=True)}, "init_from_trunk"),
        ({"vace_dit": dit(vace_pretrained="/w"), "from_pretrained": None}, "from_pretrained"),
    ],
)
def test_contradicting_sources_of_the_branch_are_rejected(tmp_path: Path, predictor: dict, fact: str) -> None:
    environment = make_run(tmp_path)
    edit(environment, **predictor)
    with raises(ConfigError, fact):
        PretrainJob.from_argv(arguments(environment), ranks=1)


def test_hfu_counts_the_blocks_that_run_twice(tmp_path: Path) -> None:
    """Hardware operations lie above the mathematics' by what is recomputed.

    Nothing, one block of each kind, all.
    """
    extra = []
    for flags in (
        [],
        ["--recompute-method=block", "--recompute-num-layers=1"],
        ["--recompute-method=uniform"],
    ):
        environment = make_run(tmp_path / str(len(extra)))
        more = [*flags, "--recompute-granularity=full"] if flags else []
        row = train(environment, *more)
        extra.append(row["hardware_tflop"] - row["model_tflop"])
    none, first, every = extra
    assert none == 0
    # of 4 + 2 blocks, trunk block 0 has no backward: block 0 of the branch alone, then 3 + 2
    assert every == pytest.approx(5 * first, rel=1e-6)
    assert first > 0
