"""A field that names an entry of a registry: checked, listed and described with the names of that moment."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Annotated, Literal

import pytest

import mindspeed_mm.registry as registry
from mindspeed_mm.config.flags import FlagParser, add_flags
from mindspeed_mm.config.names import NameIn, names_of
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import Registry
from tests.support.errors import raises

SHAPES: Registry[int] = Registry("shape", "tests.shapes")
SHAPES.add("triangle", 3)
SHAPES.add("square", 4)


class Drawing(Config):
    """A drawing."""

    shape: Annotated[str, NameIn(SHAPES)] = "square"
    colour: Literal["red", "blue"] = "red"
    size: Literal[1, 2] = 1


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with a shape whose code is broken: a name does not import it."""
    points = [EntryPoint("circle", "no_such_module:X", "tests.shapes")]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])


def test_known_names_pass_and_others_list_them() -> None:
    assert parse(Drawing, {"shape": "triangle"}, "d.json").shape == "triangle"
    with raises(ConfigError, "'triangle' or 'square'", "circle", where="d.json:shape"):
        parse(Drawing, {"shape": "circle"}, "d.json")
    for wrong in (3, None, ["square"]):
        with raises(ConfigError, where="d.json:shape"):
            parse(Drawing, {"shape": wrong}, "d.json")


@pytest.mark.usefixtures("outside")
def test_names_of_installed_packages_count_without_import() -> None:
    assert parse(Drawing, {"shape": "circle"}, "d.json").shape == "circle"
    assert names_of(Drawing.model_fields["shape"]) == ("triangle", "square", "circle")
    assert Drawing.model_json_schema()["properties"]["shape"]["enum"] == ["triangle", "square", "circle"]
    parser = FlagParser("draw", "Draw.")
    add_flags(parser, Drawing, "drawing")
    assert parser.parse_strict(["--shape", "circle"]).shape == "circle"
    with raises(ConfigError, "triangle"):
        parser.parse_strict(["--shape", "cube"])


def test_names_of_a_literal_are_its_texts() -> None:
    assert names_of(Drawing.model_fields["colour"]) == ("red", "blue")
    assert names_of(Drawing.model_fields["size"]) == ()
