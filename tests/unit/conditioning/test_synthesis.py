"""Conditions drawn at extraction.

Equal for equal seeds, exact gray, part of the feature; plain data stays as it was.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindspeed_mm.conditioning.annotate.random_masks import SHAPES
from mindspeed_mm.conditioning.recipe import parse_recipe
from mindspeed_mm.conditioning.synthesis import load_synthesized, synthesize_records
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.conditioning.tasks.spec import Clip, Sources
from mindspeed_mm.data.conditions import to_sample
from mindspeed_mm.data.config import FeatureDatasetConfig, VideoConfig
from mindspeed_mm.data.dataset import FeatureDataset
from mindspeed_mm.data.features import read_info
from mindspeed_mm.data.forms import ArrayReader
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.tasks.extract import main as extract
from tests.support.errors import meant, raises
from tests.support.extract_job import make_job
from tests.support.scenes import moving_disc, write_scene

pytestmark = pytest.mark.medium

FRAMES, _ = moving_disc(9, 48, 64, 8, 2)
RECIPE = {
    "seed": 3,
    "variants": 2,
    "tasks": {
        "inpainting_random": {"weight": 2, "options": {"references": {"integers": [0, 2]}}},
        "framerefext": {"options": {"mode": {"choice": ["first", "last", "firstlast"]}}},
        "gray": {},
        "reference_random": {},
    },
}


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("name", list(SHAPES))
def test_every_drawn_mask_is_binary_and_generates(name: str, count: int) -> None:
    for seed in range(12):
        masks = list(SHAPES[name](count, 48, 64, np.random.default_rng(seed)))
        again = list(SHAPES[name](count, 48, 64, np.random.default_rng(seed)))
        assert len(masks) == count
        assert all(mask.shape == (48, 64) and mask.dtype == np.uint8 for mask in masks)
        assert set(np.unique(np.stack(masks))) <= {0, 255}
        assert (np.stack(masks) == np.stack(again)).all()
        assert any(mask.any() for mask in masks)
        if name in ("ellipse", "circle", "box"):  # a trainer's reach the first frame only
            assert all(mask.any() for mask in masks)


def test_kept_frames_are_one_to_four_at_the_ends() -> None:
    for seed in range(40):
        first = [mask.any() for mask in SHAPES["after_first"](9, 8, 8, np.random.default_rng(seed))]
        assert first == [False] * (9 - sum(first)) + [True] * sum(first)
        assert 5 <= sum(first) <= 8
        both = [mask.any() for mask in SHAPES["middle"](9, 8, 8, np.random.default_rng(seed))]
        assert both == both[::-1]
        assert not both[0]
        assert both[4]


def test_shapes_are_drawn_by_their_weights() -> None:
    task, clip = TASKS.get("inpainting_random"), Clip(ArrayReader(FRAMES))
    options = [task.parse({"seed": seed, "shapes": {"box": 3, "all": 1}}, "t") for seed in range(400)]
    notes = [task.prepare(Sources(clips=(clip,)), each).notes for each in options]
    assert 260 < sum(note == ("mask: box",) for note in notes) < 340
    with raises(ConfigError, "boxx", meant("box")):
        task.parse({"shapes": {"boxx": 1}}, "t")


def test_references_are_crops_on_white() -> None:
    task, clip = TASKS.get("reference_random"), Clip(ArrayReader(FRAMES))
    made = task.prepare(Sources(clips=(clip,)), task.parse({"references": 3, "seed": 1}, "t"))
    assert made.steps is None
    for reference in made.references:
        assert reference.shape == (48, 64, 3)
        inside = (reference < 255).any(axis=-1)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert 24 <= np.ptp(rows) + 1 <= 48
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> SampleRecord:
    clip = write_scene(tmp_path_factory.mktemp("plain") / "scene.mkv", 9, 16, 48, 64)
    return SampleRecord(video=clip, captions=("a disc",), address="data.json[0]")


def test_missing_pixels_are_exactly_zero(record: SampleRecord) -> None:
    tasks = {"inpainting_random": {"options": {"shapes": {"box": 1}}}}
    (drawn,) = synthesize_records([record], parse_recipe({"tasks": tasks}, "r"))
    sample = to_sample(load_synthesized(drawn, VideoConfig(num_frames=9, max_hxw=4096)))
    assert sample.src_mask is not None
    assert sample.src_video is not None
    white = sample.src_mask[0] > 0
    assert white.any()
    assert (sample.src_video[:, white] == 0).all()
    kept = sample.src_video[:, ~white]
    assert (kept == sample.video[:, ~white]).all()


def test_rows_with_their_own_conditions_are_unchanged(record: SampleRecord) -> None:
    own = SampleRecord(video=record.video, captions=("a",), src_mask=record.video, row=1)
    found = synthesize_records([record, own], parse_recipe(RECIPE, "r"))
    assert [item.synthesis is not None for item in found] == [True, True, False]
    assert found[2] is own
    assert found == synthesize_records([record, own], parse_recipe(RECIPE, "r"))


def test_task_that_fails_names_row_and_task(record: SampleRecord) -> None:
    tasks = {"framerefext": {"options": {"ref_num": 40}}}
    (drawn,) = synthesize_records([record], parse_recipe({"tasks": tasks}, "r"))
    with raises(DataError, "data.json[0]", "framerefext", 41):
        load_synthesized(drawn, VideoConfig(num_frames=9, max_hxw=4096))


def test_extraction_draws_conditions_of_plain_clips(tmp_path: Path) -> None:
    flags = make_job(tmp_path)
    write_scene(tmp_path / "scene.mkv", 9, 16, 48, 64)
    rows = [{"video": "scene.mkv", "cap": "one"}, {"video": "scene.mkv", "cap": "two"}]
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    values = json.loads((tmp_path / "data.json").read_text())
    values["dataset_param"]["basic_parameters"]["data_path"] = str(tmp_path / "plain.json")
    values["dataset_param"]["synthesis"] = str(tmp_path / "recipe.yaml")
    (tmp_path / "data.json").write_text(json.dumps(values))
    extract(flags)
    lines = [json.loads(line) for line in (tmp_path / "out/data.jsonl").read_text().splitlines()]
    assert [line["cap"] for line in lines] == ["one", "one", "two", "two"]
    assert all(line["task"] in RECIPE["tasks"] for line in lines)
    for line in lines:
        metadata = read_info(tmp_path / "out" / line["file"]).metadata
        assert metadata["task"] == line["task"]
        assert "seed" in json.loads(metadata["task_options"])
    parameters = {"data_path": str(tmp_path / "out/data.jsonl")}
    features = FeatureDataset(FeatureDatasetConfig(dataset_type="feature", basic_parameters=parameters))
    assert len({features[index].key for index in range(4)}) == 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
    extract([*flags, "--num-workers", "0"])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/features").iterdir()}
