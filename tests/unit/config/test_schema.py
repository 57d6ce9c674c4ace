"""Configs: frozen, strict, and every error with the address of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError
from tests.support.errors import names, raises


class Inner(Config):
    num_heads: int = Field(default=4, gt=0)
    dtype: str = "bf16"
    UNUSED: ClassVar[Mapping[str, str]] = {"window_size": "attention is full"}


class Outer(Config):
    predictor: Inner = Inner()
    rows: tuple[Inner, ...] = ()
    name: str


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().num_heads = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "where", "fact"),
    [
        ({"name": "a", "predictor": {"num_head": 1}}, "predictor.num_head", "num_heads"),
        ({"name": "a", "rows": [{}, {"dtyp": 1}]}, "rows[1].dtyp", "dtype"),
        ({"name": "a", "zzz": 1}, "zzz", "unknown"),
        ({}, "name", "missing"),
        ({"name": "a", "predictor": {"num_heads": 0}}, "predictor.num_heads", 0),
        ({"name": None}, "name", "null"),
    ],
)
def test_error_has_the_address_of_the_key(values: object, where: str, fact: object) -> None:
    with raises(ConfigError, fact, where=f"f.json:{where}"):
        parse(Outer, values, "f.json")


def test_address_that_leads_into_a_file_has_dots_after_it() -> None:
    with raises(ConfigError, "/a:b/f.json:data.num_head"):
        parse(Inner, {"num_head": 1}, "/a:b/f.json:data")


def test_all_problems_are_reported_immediately() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"predictor": {"num_heads": -1}, "nam": "a"}, "f.json")
    assert len(str(caught.value).split("; ")) >= 3


@pytest.mark.parametrize("values", [[], "text", 7, None])
def test_something_else_than_an_object_is_an_error_with_the_file(values: object) -> None:
    with raises(ConfigError, "f.json"):
        parse(Outer, values, "f.json")


def test_keys_of_older_files_are_accepted_and_named_once() -> None:
    notes: list[str] = []
    values = {
        "name": "a",
        "predictor": {"window_size": [-1, -1]},
        "rows": [{"window_size": 1}, {"window_size": 2}],
    }
    config = parse(Outer, values, "f.json", notes)
    assert config.predictor == Inner()
    (note,) = notes
    assert note.startswith("f.json:window_size: ")
    assert names(note, "unused", Inner.UNUSED["window_size"])


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.integers(), max_size=5))
def test_whatever_is_written_it_parses_or_is_one_of_our_errors(values: dict[str, int]) -> None:
    known = set(values) <= {*Inner.model_fields, *Inner.UNUSED}
    if known and values.get("num_heads", 1) > 0 and "dtype" not in values:
        assert parse(Inner, values, "f.json").num_heads == values.get("num_heads", 4)
    else:
        with raises(ConfigError, "f.json"):
            parse(Inner, values, "f.json")
