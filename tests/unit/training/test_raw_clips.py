"""The stream of raw clips.

Draws follow from (seed, sample index) alone; stages, shifts and weights act where they say.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_mm.conditioning.recipe import Recipe, parse_recipe, training_draw
from mindspeed_mm.conditioning.synthesis import load_synthesized
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.loader import Collate, Draw
from mindspeed_mm.data.sample import Batch, SampleRecord
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.flow.schedule import build_schedule
from mindspeed_mm.training.groups import GroupMeans, LossGroups
from mindspeed_mm.training.raw_clips import RawBatches, Stream
from mindspeed_mm.training.step import LocalWork, StepSettings, TaskSettings, accumulate
from mindspeed_mm.training.timers import PhaseTimers
from tests.support.errors import meant, raises
from tests.support.loops import Recorder, Records, random_records, trainer, training
from tests.support.scenes import write_scene
from tests.support.tiny import TINY, tiny_transformer

pytestmark = pytest.mark.medium

VALUES = {
    "seed": 3,
    "tasks": {
        "inpainting_random": {"weight": 2, "options": {"references": {"integers": [0, 2]}}},
        "framerefext": {"options": {"mode": {"choice": ["first", "last"]}}},
        "flat": {"task": "gray"},
    },
    "stages": [
        {"until": 2, "weights": {"flat": 1}},
        {"until": 3, "weights": {"framerefext": 1, "flat": 0}},
        {"weights": {"inpainting_random": 1}},
    ],
}
CONFIG = VideoConfig(num_frames=5, max_hxw=1024)


class FakeVae:
    """Means of 8x8 cells of the first of every four frames, in 16 channels."""

    device = torch.device("cpu")

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8))
        return cells.repeat(1, 6, 1, 1, 1)[:, :16]


class FakeText:
    def encode(self, prompts) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full((len(prompt), TINY.trunk.text_dim), float(len(prompt))) for prompt in prompts)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[SampleRecord]:
    folder = tmp_path_factory.mktemp("raw")
    clip = write_scene(folder / "scene.mkv", 5, 16, 32, 32)
    rows = [{"captions": ("a ball", "a disc")}, {"captions": ("a",)}, {"captions": ("b",)}]
    return [
        SampleRecord(video=clip, address=f"data.json[{row}]", row=row, **values)
        for row, values in enumerate(rows)
    ]


def stream_of(records: list[SampleRecord], recipe: Recipe | None, micro: int = 1, batch: int = 4) -> Stream:
    grids = [(5, 32, 32)] * len(records)
    return Stream(
        records, grids, recipe, micro_batch_size=micro, global_batch_size=batch, seed=5, shuffle=True
    )


def raw_batches(stream: Stream, **more) -> RawBatches:
    load = partial(load_synthesized, config=CONFIG)
    vae, text = StreamEncoder(FakeVae()), PromptCache(FakeText())
    return RawBatches(stream, load, vae, text, Collate(seed=5), **more)


def take(source: RawBatches, count: int, consumed: int = 0) -> list[Batch]:
    batches = source.batches(consumed)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def same(one: Batch, other: Batch) -> bool:
    return (
        one.tasks == other.tasks
        and one.keys == other.keys
        and torch.equal(one.latents, other.latents)
        and torch.equal(one.vace_context, other.vace_context)
        and torch.equal(one.prompt_embeds, other.prompt_embeds)
    )


def test_draws_do_not_depend_on_ranks_or_the_start(records):
    stream = stream_of(records, parse_recipe({**VALUES, "stages": []}, "recipe"))
    alone = take(raw_batches(stream), 8)
    assert len({batch.tasks for batch in alone}) > 1
    for rank in range(2):
        shared = take(raw_batches(stream, dp_rank=rank, dp_size=2), 4)
        assert all(same(batch, alone[2 * k + rank]) for k, batch in enumerate(shared))
    later = take(raw_batches(stream), 3, consumed=5)
    assert all(same(batch, alone[5 + k]) for k, batch in enumerate(later))


@pytest.mark.medium
def test_draws_do_not_depend_on_workers(records):
    stream = stream_of(records, parse_recipe({**VALUES, "stages": []}, "recipe"))
    here = raw_batches(stream)
    readers = raw_batches(stream, num_workers=2)
    assert all(map(same, take(here, 5), take(readers, 5)))
    costs = readers.costs.take()
    assert list(costs) == ["readers", "waiting", "vae", "text"]
    assert min(costs.values()) > 0
    assert max(readers.costs.take().values()) == 0


def test_micro_batches_share_the_task_but_not_the_masks(records):
    values = {"tasks": {"inpainting_random": {"options": {"shapes": {"box": 1}}}, "framerefext": {}}}
    batches = take(raw_batches(stream_of(records, parse_recipe(values, "recipe"), micro=2)), 6)
    assert {batch.tasks for batch in batches} == {("inpainting_random",) * 2, ("framerefext",) * 2}
    for batch in batches:
        if batch.tasks[0] == "inpainting_random":
            assert not torch.equal(batch.vace_context[0], batch.vace_context[1])


def test_stages_choose_tasks_by_iteration(records):
    stream = stream_of(records, parse_recipe(VALUES, "recipe"))
    tasks = [stream.plan(Draw(0, index)).task for index in range(16)]
    assert tasks == ["flat"] * 8 + ["framerefext"] * 4 + ["inpainting_random"] * 4
    assert stream.tasks == ("inpainting_random", "framerefext", "flat", "given")


def test_rows_that_no_entry_takes_stay_as_they_are(records):
    recipe = parse_recipe({"tasks": {"gray": {"clips": ["other*"]}}}, "recipe")
    assert stream_of(records, recipe).plan(Draw(0, 3)).task == "given"
    assert stream_of(records, None).plan(Draw(0, 3)).record.synthesis is None


def test_training_draws_follow_the_weights():
    recipe = parse_recipe({"tasks": {"gray": {"weight": 3}, "plain": {"task": "canny"}}}, "recipe")
    names = [
        training_draw(recipe, "a.mp4", seed=1, sample_index=i, first_index=i, iteration=1).name
        for i in range(400)
    ]
    assert 265 < names.count("gray") < 335


@pytest.mark.parametrize(
    ("stages", "facts"),
    [
        ([{"weights": {"flat": 1}}, {"until": 4, "weights": {"flat": 1}}], ("None", "4")),
        ([{"until": 4, "weights": {"flat": 1}}, {"until": 4, "weights": {"flat": 1}}], ("4, 4",)),
        ([{"weights": {"flatt": 1}}], ("flatt", meant("flat"))),
        ([{"weights": {"flat": 0}}], ("all 0",)),
    ],
)
def test_stages_that_cannot_be_followed_are_rejected(stages, facts):
    with raises(ConfigError, *facts):
        parse_recipe({**VALUES, "stages": stages}, "recipe.yaml")


def test_broken_clip_ends_training_with_its_row(records, tmp_path: Path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    bad = SampleRecord(video=broken, captions=("a",), address="data.json[9]", row=0)
    with raises(DataError, where=f"data.json[9]: {broken}"):
        take(raw_batches(stream_of([bad], None)), 1)


def test_samples_of_other_shapes_are_not_stacked(records):
    class Odd(Stream):
        def plan(self, draw):
            planned = super().plan(draw)
            return planned if draw.sample_index % 2 else super().plan(Draw(draw.record, 100))

    values = {"tasks": {"reference_random": {"options": {"references": {"integers": [1, 4]}}}}}
    odd = Odd(
        records,
        [(5, 32, 32)] * 3,
        parse_recipe(values, "recipe"),
        micro_batch_size=2,
        global_batch_size=2,
        seed=5,
        shuffle=False,
    )
    with raises(DataError, "references", "--micro-batch-size", where="data.json[0]"):
        take(raw_batches(odd), 12)


def tasks_of(records: Records, *tasks: str) -> Records:
    from dataclasses import replace

    return Records(replace(record, task=task) for record, task in zip(records, tasks, strict=True))


def test_losses_are_reported_by_task_and_timestep():
    recorder, config = Recorder(), training(batch={"train_iters": 6, "global_batch_size": 4})
    records = tasks_of(random_records(4), "gray", "depth", "gray", "")
    run = trainer(tiny_transformer(), config, records, writers=[recorder], tasks=("depth", "gray"))
    run.run()
    for _, row in recorder.rows:
        quarters = {key: value for key, value in row.items() if key.startswith("loss/timestep/")}
        assert {"loss/task/gray", "loss/task/depth"} <= set(row)
        assert 1 <= len(quarters) <= 4
    names = {key for _, row in recorder.rows for key in row if key.startswith("loss/timestep/")}
    assert names <= {
        "loss/timestep/0-625",
        "loss/timestep/625-833",
        "loss/timestep/833-938",
        ("loss/timestep/938-1000"),
    }


def test_loss_groups_add_up_to_the_samples():
    groups = LossGroups.of(("a", "b"), build_schedule(ScheduleConfig(shift=1.0)))
    work = LocalWork(
        sample_losses=[torch.tensor([1.0, 3.0]), torch.tensor([float("nan"), 5.0])],
        timesteps=[torch.tensor([100.0, 900.0]), torch.tensor([300.0, 990.0])],
        tasks=["a", "b", "", "a"],
    )
    means = groups.means(groups.totals(work).tolist())
    assert means.pop("timestep/250-500") != means.get("task/a")  # NaN stays in its own group
    assert means == {"task/a": 3.0, "task/b": 3.0, "timestep/0-250": 1.0, "timestep/750-1000": 4.0}
    said = GroupMeans(groups)
    said.add([4.0, 0, 1, 0, 0, 0, 2, 0, 1, 0, 0, 0])
    said.add([2.0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0])
    assert "a: 2.000000E+00 | 0-250: 1.000000E+00" in said.line(7)


def test_tasks_have_their_own_shift_and_weight():
    batch = Collate(seed=1).stack([(random_records(1)[0], 3), (random_records(2)[1], 4)])
    model, schedule = tiny_transformer(), build_schedule(ScheduleConfig())
    low = build_schedule(ScheduleConfig(shift=0.1))

    def work(tasks: dict[str, TaskSettings], *names: str) -> LocalWork:
        from dataclasses import replace

        settings = StepSettings(1, schedule, seed=1, exclude_refs=False, clip_grad=1.0, tasks=tasks)
        return accumulate(
            model,
            [replace(batch, tasks=names)],
            settings,
            torch.device("cpu"),
            PhaseTimers(torch.device("cpu")),
        )

    plain = work({}, "a", "b")
    doubled = work({"a": TaskSettings(schedule, 2.0), "b": TaskSettings(schedule, 2.0)}, "a", "b")
    assert doubled.losses[0].item() == pytest.approx(2 * plain.losses[0].item())
    assert torch.equal(doubled.sample_losses[0], plain.sample_losses[0])
    shifted = work({"b": TaskSettings(low)}, "a", "b")
    assert shifted.timesteps[0][0] == plain.timesteps[0][0]
    assert shifted.timesteps[0][1] < plain.timesteps[0][1]
    assert np.isfinite(shifted.losses[0].item())
