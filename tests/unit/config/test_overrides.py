"""`--set a.b=value`: what it replaces, and one line for what it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from mindspeed_mm.config.overrides import Overrides
from mindspeed_mm.config.values import parse_value
from mindspeed_mm.errors import ConfigError
from tests.support.errors import meant


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("7", 7),
        ("1e-5", 1e-5),
        ("true", True),
        ("null", None),
        ("[7,8]", [7, 8]),
        ('{"a": 1}', {"a": 1}),
        ('"7"', "7"),
        ("bf16", "bf16"),
        ("./a b=c", "./a b=c"),
        ("", ""),
        ("NaN", "NaN"),
    ],
)
def test_override_values_are_json_or_text(word: str, value: Any) -> None:
    assert parse_value(word) == value


def test_overrides_replace_nested_keys_and_leave_the_rest() -> None:
    before: dict[str, Any] = {"a": {"b": 1, "c": [1, {"d": 2}]}, "n": None}
    after = Overrides.parse(["a.b=5", "a.c[1].d=6", "a.c.0=7", "n.x.y=8"]).apply(before)
    assert after == {"a": {"b": 5, "c": [7, {"d": 6}]}, "n": {"x": {"y": 8}}}
    assert before == {"a": {"b": 1, "c": [1, {"d": 2}]}, "n": None}


def test_overrides_of_the_same_key_let_the_last_win() -> None:
    assert Overrides.parse(["a=1", "a=2"]).apply({}) == {"a": 2}


def test_overrides_belong_to_the_file_they_name() -> None:
    overrides = Overrides.parse(["model.a=1", "data.a=2"], ("model", "data"))
    assert (overrides.apply({}, "model"), overrides.apply({}, "data")) == ({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("word", "values", "facts"),
    [
        ("a", {}, ("--set a", "equals sign")),
        ("=1", {}, ("key=value",)),
        ("a..b=1", {}, ("--set a..b=1",)),
        ("a.b=1", {"a": "text"}, ("--set a.b=1", "'b'", "a string")),
        ("a[3]=1", {"a": [1, 2]}, ("--set a[3]=1", "below 2", "'3'")),
        ("a.x=1", {"a": [1, 2]}, ("below 2", "'x'")),
    ],
)
def test_overrides_name_what_cannot_be_set(word: str, values: Any, facts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Overrides.parse([word]).apply(values)
    assert all(fact in str(caught.value) for fact in facts), caught.value


@pytest.mark.parametrize("word", ["modle.a=1", "model=1", "training.lr=1"])
def test_overrides_of_an_unknown_file_name_the_known(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Overrides.parse([word], ("model", "data"))
    assert "model., data." in str(caught.value)
    assert (meant("model") in str(caught.value)) == word.startswith("modle")
