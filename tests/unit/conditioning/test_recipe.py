"""Recipes: draws depend on seed and row alone; what cannot be drawn is refused on reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.conditioning.recipe import draws, parse_recipe, read_recipe
from mindspeed_mm.errors import ConfigError
from tests.support.errors import meant, raises

TASKS: dict[str, Any] = {
    "inpainting": {"weight": 3, "options": {"mode": "salientmasktrack"}},
    "framerefext": {"options": {"mode": {"choice": ["first", "last"]}, "ref_num": {"integers": [1, 4]}}},
    "border": {"task": "outpainting_inner", "options": {"expand_ratio": {"uniform": [0.1, 0.4]}}},
}


def test_draws_depend_only_on_seed_and_row() -> None:
    recipe = parse_recipe({"seed": 3, "variants": 2, "tasks": TASKS}, "r")
    more = parse_recipe({"seed": 3, "variants": 5, "tasks": TASKS}, "r")
    other = parse_recipe({"seed": 4, "variants": 2, "tasks": TASKS}, "r")
    first = [draws(recipe, row, "a.mp4") for row in range(30)]
    assert first == [draws(recipe, row, "a.mp4") for row in range(30)]
    assert first == [draws(more, row, "a.mp4")[:2] for row in range(30)]
    assert first != [draws(other, row, "a.mp4") for row in range(30)]


def test_weights_and_ranges_are_kept() -> None:
    recipe = parse_recipe({"tasks": TASKS}, "r")
    found = [draws(recipe, row, "a.mp4")[0] for row in range(1000)]
    counts = Counter(draw.name for draw in found)
    assert 540 < counts["inpainting"] < 660
    assert 160 < counts["border"] < 240
    values: list[Any] = [draw.options for draw in found]
    kept = [options for draw, options in zip(found, values, strict=True) if draw.name == "framerefext"]
    assert {(o.mode, o.ref_num) for o in kept} == {(m, n) for m in ("first", "last") for n in (1, 2, 3, 4)}
    ratios = [o.expand_ratio for draw, o in zip(found, values, strict=True) if draw.name == "border"]
    assert 0.1 <= min(ratios) < 0.12
    assert 0.38 < max(ratios) <= 0.4
    assert len({options.seed for options in values}) == 1000


def test_entries_are_drawn_for_the_clips_they_name() -> None:
    recipe = parse_recipe({"tasks": {"gray": {"clips": ["dog*.mp4"]}, "flow": {"clips": ["*/cats/*"]}}}, "r")
    assert [draw.name for draw in draws(recipe, 0, "/data/dogs/dog1.mp4")] == ["gray"]
    assert [draw.name for draw in draws(recipe, 0, "/data/cats/dog1.mkv")] == ["flow"]
    assert draws(recipe, 0, "/data/birds/a.mp4") == []


def test_control_task_comes_once_a_clip() -> None:
    recipe = parse_recipe({"variants": 3, "tasks": {"gray": {"weight": 99}, **TASKS}}, "r")
    for row in range(20):
        assert Counter(draw.name for draw in draws(recipe, row, "a"))["gray"] <= 1
    alone = parse_recipe({"variants": 2, "tasks": {"gray": {}}}, "r")
    assert [draw.name for draw in draws(alone, 0, "a")] == ["gray", "gray"]


@pytest.mark.parametrize(
    ("tasks", "facts"),
    [
        ({"inpaintin": {}}, ["inpaintin", meant("inpainting")]),
        ({"inpainting": {"weigth": 1}}, ["weigth", meant("weight")]),
        ({"inpainting": {}}, ["mode"]),
        ({"inpainting": {"options": {"mod": "bbox"}}}, ["mod", meant("mode")]),
        ({"inpainting": {"options": {"mode": {"choice": ["salient", "bbx"]}}}}, ["mode", "bbx"]),
        ({"inpainting": {"options": {"mode": "bbox", "refine": "fats"}}}, ["refine", "fast", "'fats'"]),
        ({"inpainting": {"options": {"mode": {"choise": ["salient"]}}}}, ["choise", meant("choice")]),
        ({"framerefext": {"options": {"ref_num": {"integers": [4, 1]}}}}, ["ref_num.integers", "[4, 1]"]),
        ({"framerefext": {"options": {"ref_num": {"integers": [0, 1]}}}}, ["ref_num", "at least 1"]),
        ({"outpainting": {}}, ["outpainting", meant("outpainting_inner")]),
        ({"gray": {"options": {"seed": 1}}}, ["seed", "recipe's seed"]),
        ({"gray": {"weight": 0}}, ["weight", "more than 0"]),
        ({"depth": {"options": {"annotators": "/nowhere"}}}, ["depth.onnx", "tasks.depth"]),
        ({"a/b": {"task": "gray"}}, ["a/b"]),
        ({}, ["tasks"]),
    ],
)
def test_recipe_is_rejected_when_it_is_read(tasks: dict[str, Any], facts: list[str]) -> None:
    with raises(ConfigError, *facts):
        parse_recipe({"tasks": tasks}, "recipe.yaml")


def test_recipe_file_must_hold_an_object(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- gray\n")
    with raises(ConfigError, "a list", where=str(path)):
        read_recipe(path)
