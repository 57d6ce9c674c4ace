"""A caption of more than text_len tokens is cut, and a warning says which and by how much."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.models.umt5.tokenizer import Tokenizer
from mindspeed_mm.tasks.extraction import report_long_captions
from tests.tiny import write_tokenizer

SHORT, LONG = "a red ball bounces", "a red ball bounces " * 20


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "t")
    return Tokenizer(tmp_path / "t", 16)


def records(*captions: tuple[str, ...]) -> list[SampleRecord]:
    return [
        SampleRecord(video=Path("v.mp4"), captions=texts, address=f"data.json[{row}]")
        for row, texts in enumerate(captions)
    ]


def test_extraction_names_rows_and_tokens(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report_long_captions(records((SHORT,), (SHORT, LONG)), tokenizer)
        tokenizer([SHORT, LONG])
    (message,) = [record.getMessage() for record in caplog.records]
    (tokens,) = tokenizer.count([LONG])
    assert tokens > 16
    assert message.startswith("1 of 3 captions have more than 16 tokens")
    assert f"data.json[1] ({tokens})" in message


def test_nothing_is_said_of_captions_that_fit(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    report_long_captions(records((SHORT,)), tokenizer)
    tokenizer([SHORT])
    assert not caplog.records


def test_a_prompt_that_is_cut_is_named_once(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer([LONG])
    tokenizer([LONG, SHORT])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "16" in message
    assert str(tokenizer.count([LONG])[0]) in message
