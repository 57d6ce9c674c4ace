"""Registries: our own entries, strangers' entry points, and helpful errors."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import mindspeed_mm.registry as registry
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import Registry, did_you_mean, resolve
from tests.support.errors import raises


@pytest.fixture
def shapes() -> Registry[int]:
    made: Registry[int] = Registry("shape", "tests.shapes")
    made.add("square", 4)
    made.add("triangle", 3)
    return made


def test_added_entries_are_found_and_listed_in_order(shapes: Registry[int]) -> None:
    assert shapes.get("square") == 4
    assert list(shapes) == ["square", "triangle"]
    assert "square" in shapes
    assert "circle" not in shapes


def test_alias_finds_its_entry_and_is_not_listed(shapes: Registry[int]) -> None:
    shapes.alias("quad", "square")
    assert shapes.get("quad") == 4
    assert list(shapes) == ["square", "triangle"]
    shapes.add("quad", 5)
    assert shapes.get("quad") == 5


def test_unknown_name_lists_the_nearest_and_all(shapes: Registry[int]) -> None:
    with raises(ConfigError, "'sqare'", "'square'", "square, triangle"):
        shapes.get("sqare")


def test_one_name_cannot_stand_for_two_things(shapes: Registry[int]) -> None:
    assert shapes.add("square", 4) == 4  # the same again is no conflict
    with raises(ConfigError, "twice"):
        shapes.add("square", 5)


def test_outside_entry_point_is_loaded_only_on_use(
    shapes: Registry[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        EntryPoint("tau", "math:tau", "tests.shapes"),
        EntryPoint("broken", "no_such_module:X", "tests.shapes"),
        EntryPoint("square", "math:pi", "tests.shapes"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    assert list(shapes) == ["broken", "square", "tau", "triangle"]
    assert shapes.get("tau") == pytest.approx(6.2831853)
    assert shapes.get("square") == 4  # ours wins


def test_did_you_mean_is_empty_when_nothing_is_near() -> None:
    assert did_you_mean("num_head", ["num_heads", "dtype"]) == " (did you mean 'num_heads'?)"
    assert did_you_mean("SRC_VIDEO", ["video", "src_video"]) == " (did you mean 'src_video'?)"
    assert did_you_mean("zzz", ["num_heads", "dtype"]) == ""


def test_resolve_imports_what_is_named() -> None:
    assert resolve("pathlib:Path") is Path


def test_naming_code_does_not_import_it() -> None:
    source = (
        "from mindspeed_mm.models.spec import MODELS; MODELS.get('vace'); import sys; sys.exit('torch' in "
        "sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", source], cwd=Path(__file__).resolve().parents[2]).returncode
        == 0
    )
