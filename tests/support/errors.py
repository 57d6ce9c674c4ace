"""How tests look at errors: their kind and fields, never a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mindspeed_mm.errors import MindSpeedMMError


@contextmanager
def raises(
    kind: type[MindSpeedMMError], *facts: object, where: str | Path | None = None
) -> Iterator[pytest.ExceptionInfo[MindSpeedMMError]]:
    """The block raises exactly `kind`, at `where` if given, and its line names each of `facts`.

    A fact is a path, name, number or key that a user needs, as a whole word: 81 is not found in 812.
    """
    with pytest.raises(MindSpeedMMError) as caught:
        yield caught
    error = caught.value
    line = str(error)
    assert type(error) is kind, line
    assert "\n" not in line
    if where is not None:
        assert error.where == str(where), line
    for fact in facts:
        assert re.search(rf"(?<!\w){re.escape(str(fact))}(?!\w)", line), f"{fact!r} is not in: {line}"
