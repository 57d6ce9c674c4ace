"""A caption of more than text_len tokens is cut, and a warning says which and by how much."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mindspeed_mm.models.umt5.tokenizer import Tokenizer
from tests.support.tiny import write_tokenizer

SHORT, LONG = "a red ball bounces", "a red ball bounces " * 20


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "t")
    return Tokenizer(tmp_path / "t", 16)


def test_long_captions_are_named_with_their_tokens(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer.report_long([("data.json[0]", SHORT), ("data.json[1]", SHORT), ("data.json[1]", LONG)])
        tokenizer([SHORT, LONG])
    (message,) = [record.getMessage() for record in caplog.records]
    (tokens,) = tokenizer.count([LONG])
    assert tokens > 16
    assert message.startswith("1 of 3 captions")
    assert f"data.json[1] ({tokens})" in message


def test_captions_that_fit_are_not_reported(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.report_long([("data.json[0]", SHORT)])
    tokenizer([SHORT])
    assert not caplog.records


def test_cut_prompt_is_named_once(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer([LONG])
    tokenizer([LONG, SHORT])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "16" in message
    assert str(tokenizer.count([LONG])[0]) in message
