"""How tests look at errors: their kind and fields, never a sentence."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.files import path_problem
from mindspeed_mm.registry import did_you_mean


def names(line: str, *facts: object) -> bool:
    """Whether a line names each fact as a whole word: 81 is not found in 812."""
    return all(re.search(rf"(?<!\w){re.escape(str(fact))}(?!\w)", line) for fact in facts)


@contextmanager
def raises(
    kind: type[MindSpeedMMError], *facts: object, where: str | Path | None = None
) -> Iterator[pytest.ExceptionInfo[MindSpeedMMError]]:
    """The block raises exactly `kind`, at `where` if given, and its line names each of `facts`.

    A fact is a path, name, number or key that a user needs.
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
        assert names(line, fact), f"{fact!r} is not in: {line}"


def absent(path: str | Path) -> str:
    """The problem that the product reports for a path where there is no file."""
    return path_problem(path, FileNotFoundError(errno.ENOENT, ""))


def meant(name: str) -> str:
    """What the product adds to a name that is misspelt: `(did you mean 'name'?)`."""
    return did_you_mean(name, [name]).strip()
