"""Fields become flags: name, type, default and help come from the schema."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from mindspeed_mm.config.flags import FlagParser, add_flags, flag_name, given
from mindspeed_mm.config.schema import Config
from mindspeed_mm.errors import ConfigError
from tests.support.errors import raises


class Optimizer(Config):
    adam_beta1: float = Field(default=0.9, description="decay of the mean, 100% of it")
    train_iters: int | None = Field(default=None, description="iterations")
    style: Literal["constant", "cosine"] = Field(default="constant", description="shape")
    bf16: bool = Field(default=False, description="half precision")
    ranks: tuple[int, ...] = Field(default=(0,), description="which ranks")
    scale: float | tuple[float, ...] | None = Field(default=None, description="one or several")
    path: str | tuple[str, ...] | None = Field(default=None, description="a name may hold commas")


@pytest.fixture
def parser() -> FlagParser:
    made = FlagParser("prog", "A test.")
    add_flags(made, Optimizer, "optimizer")
    return made


def test_each_field_is_a_flag_of_its_type(parser: FlagParser) -> None:
    argv = ["--adam-beta1", "0.8", "--train-iters", "7", "--style", "cosine", "--bf16", "--ranks", "1", "2"]
    assert given(parser.parse_strict(argv), Optimizer) == {
        "adam_beta1": 0.8, "train_iters": 7, "style": "cosine", "bf16": True, "ranks": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(("word", "wanted"), [("0.5", 0.5), ("1,-0.5", (1.0, -0.5))])
def test_field_of_one_or_several_takes_them_in_one_word(
    word: str, wanted: object, parser: FlagParser
) -> None:
    assert given(parser.parse_strict(["--scale", word]), Optimizer) == {"scale": wanted}
    assert "--scale X[,X…]" in parser.format_help()
    assert given(parser.parse_strict(["--path", "a,b"]), Optimizer) == {"path": "a,b"}


def test_flag_that_is_not_given_leaves_the_schema_s_default(parser: FlagParser) -> None:
    assert given(parser.parse_strict([]), Optimizer) == {}


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["--adam-bta1", "1"], ("'--adam-bta1'", "'--adam-beta1'")),
        (["--adam", "1"], ("'--adam'",)),  # no abbreviations
        (["--adam-beta1", "much"], ("--adam-beta1", "float", "much")),
        (["--style", "linear"], ("--style", "linear")),
        (["--train-iters"], ("--train-iters", "one argument")),
    ],
)
def test_wrong_flag_is_a_config_error(argv: list[str], facts: tuple[str, ...], parser: FlagParser) -> None:
    with raises(ConfigError, *facts):
        parser.parse_strict(argv)


def test_help_shows_description_and_default(parser: FlagParser) -> None:
    text = " ".join(parser.format_help().split())
    assert f"{Optimizer.model_fields['adam_beta1'].description} (default: 0.9)" in text
    assert flag_name("train_iters") == "--train-iters"
