"""A whole training job gives the same numbers on any number of ranks."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mindspeed_mm.errors import MindSpeedMMError, TrainingError, WeightsError
from tests.support.errors import names
from tests.support.runs import arguments, make_run, train_job, write_json


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("a run"))


@pytest.fixture(scope="module")
def metrics(world, environment, tmp_path_factory):
    """→ the rows of a run on some ranks."""

    def run(ranks, **flags):
        order = arguments(environment, save=tmp_path_factory.mktemp("run"), eval_interval=5, **flags)
        return world.run(ranks, train_job, order)[-1]  # the last rank writes

    return run


@pytest.fixture(scope="module")
def alone(metrics):
    return metrics(1)


@pytest.mark.parametrize(("ranks", "flags"), [(2, {}), (4, {}), (4, {"context_parallel_size": 2})])
def test_one_rank_equals_many(metrics, alone, ranks, flags):
    together = metrics(ranks, **flags)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-6)
    assert [row["tokens"] for row in together if "tokens" in row] == [
        row["tokens"] for row in alone if "tokens" in row
    ]
    assert [row["grad_norm"] for row in together if "loss" in row] == pytest.approx(
        [row["grad_norm"] for row in alone if "loss" in row], rel=1e-4
    )
    held_out = [
        [row["validation/loss"] for row in rows if "validation/loss" in row] for rows in (alone, together)
    ]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)
    assert len(held_out[0]) == 1


def refusal(argv):
    try:
        train_job(argv)
    except WeightsError as error:
        return str(error)
    return "trained"


def test_branch_checkpoint_says_how_to_train_everything(world, tmp_path):
    run, saved = make_run(tmp_path), str(tmp_path / "branch")
    world.run(1, train_job, arguments(run, save=saved, save_interval=2, train_iters=2))
    model = json.loads(Path(run["MM_MODEL"]).read_text())
    model["predictor"]["trainable"] = "all"
    write_json(Path(run["MM_MODEL"]), model)
    begun = arguments(run, "--finetune", load=saved, train_iters=1)
    (message,) = world.run(1, refusal, begun)
    assert names(message, "lacks", "wan_dit")
    assert "\n" not in message

    named = re.search(r"\bpredictor\.from_pretrained to (\S+) .*--load\b", message)
    assert named, message
    model["predictor"]["from_pretrained"] = named[1]
    write_json(Path(run["MM_MODEL"]), model)
    (rows,) = world.run(1, train_job, arguments(run, train_iters=1))
    assert [row["iteration"] for row in rows if "loss" in row] == [1]


def seen_samples(argv):
    """Timestep, noise and key of this rank's first samples."""
    import itertools

    from mindspeed_mm.flow.matching import sample_flow
    from mindspeed_mm.tasks.assembly import assemble
    from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
    from tests.support.loops import CPU

    run = assemble(PretrainJob.from_argv(argv), CPU)
    batches = list(itertools.islice(run.data.batches, 4))
    samples = [
        sample_flow(batch.latents, run.step.schedule, batch.sample_index, run.step.seed) for batch in batches
    ]
    noise = [
        float((s.target + b.latents.float()).flatten()[0]) for s, b in zip(samples, batches, strict=True)
    ]
    return noise, [float(s.timestep) for s in samples], [int(batch.sample_index) for batch in batches]


def test_two_ranks_draw_different_noise_and_timesteps(world, environment, tmp_path):
    answers = world.run(2, seen_samples, arguments(environment, save=tmp_path / "save"))
    for first, second in zip(*answers, strict=True):
        assert not set(first) & set(second)


def train_any_job(argv: Sequence[str]) -> list[dict[str, Any]]:
    """`train_job` that reads values of any size: only one that the reader refuses makes a loss infinite."""
    with mock.patch("mindspeed_mm.data.published.MAX_VALUE", float("inf")):
        return train_job(argv)


def test_bad_sample_stops_every_rank_and_is_named(world, tmp_path):
    from tests.support.loops import random_records
    from tests.support.runs import write_features

    environment = make_run(tmp_path / "poisoned")
    records = random_records(6, ((3, 4, 6), (2, 6, 4)))
    records[3].latents.fill_(3e38)  # finite; its loss is not
    write_features(tmp_path / "poisoned" / "features of a run", records)
    rows = world.run(2, train_any_job, arguments(environment, global_batch_size=2, train_iters=3))[-1]
    assert [row["stepped"] for row in rows].count(0.0) == 1  # six clips, three iterations: each is seen once
    with pytest.raises(AssertionError, match=r"TrainingError.*clip3"):
        world.run(2, train_any_job, arguments(environment, "--check-for-nan-in-loss-and-grad", train_iters=6))


def job_error(argv: Sequence[str], *, metrics: bool = True) -> str:
    """Train on this rank, whose metrics may be impossible to write. Return the error."""
    from mindspeed_mm.training.hooks.metric_writers import JsonLines

    def full(self: JsonLines, iteration: int, values: dict[str, float]) -> None:
        raise TrainingError("no space left", where="metrics.jsonl")

    with mock.patch.object(JsonLines, "write", JsonLines.write if metrics else full):
        try:
            train_job(argv)
        except MindSpeedMMError as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


@pytest.fixture
def damaged(tmp_path):
    """A run whose clip 2 has one byte changed behind the header, where no check at the start looks."""
    environment = make_run(tmp_path / "damaged")
    file = tmp_path / "damaged/features of a run/features/clip2.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return environment


@pytest.mark.timeout(120)
@pytest.mark.parametrize("flags", [{}, {"eval_interval": 1, "eval_iters": 3}])
def test_feature_that_one_rank_cannot_read_ends_all(world, damaged, tmp_path, flags):
    order = arguments(damaged, save=tmp_path / "save", global_batch_size=2, train_iters=12, **flags)
    first, second = world.run(2, job_error, order)
    assert first == second
    assert first.startswith("DataError")
    assert "clip2.safetensors" in first


@pytest.mark.timeout(120)
def test_metrics_that_one_rank_cannot_write_end_all(world, environment, tmp_path):
    order = arguments(environment, save=tmp_path / "save", global_batch_size=2, train_iters=12)
    assert (
        world.run(2, job_error, order, metrics=False) == ["TrainingError: metrics.jsonl: no space left"] * 2
    )
