"""The errors that this package raises on bad input.

    MindSpeedMMError
    ├── ConfigError    a flag, JSON or YAML value: unknown, misspelt, out of range, contradictory
    ├── DataError      a dataset, clip, mask, caption or feature file
    ├── WeightsError   a checkpoint: missing, damaged, of another model, in an unknown format
    ├── LaunchError    ranks, devices, process groups, a folder that another run writes to
    ├── TrainingError  a run that must stop: too many non-finite iterations in a row, no space for metrics
    └── NonFiniteError a video whose latents or pixels are NaN or infinite

An error has fields: where it is, what is wrong, what was expected and what to do. `str(error)` joins them in
one line:

    DataError("src_mask has 40 frames, src_video has 81", where="data.json[17]", fix="cut both to one length")
    data.json[17]: src_mask has 40 frames, src_video has 81; cut both to one length

    ConfigError("got a list", where="vace.json", expected="a JSON object with the keys model and prompt")
    vace.json: expected a JSON object with the keys model and prompt, got a list

Because fields may quote a file, the line escapes control characters, which would affect the terminal, and
shortens long text.
"""

from __future__ import annotations

import re
import unicodedata
from os import PathLike
from typing import TypeVar

_LONGEST = 2000  # maximum characters of a problem or a fix
_LONGEST_ADDRESS = 500
_BREAKS = re.compile(r"\s*[\n\r\t\v\f\x1c-\x1f\x85\u2028\u2029]\s*")
E = TypeVar("E", bound="MindSpeedMMError")


def printable(text: str, max_chars: int) -> str:
    """Return text for a message.

    Control characters are escaped. Text of more than `max_chars` characters is shortened in the middle.
    """
    if len(text) > max_chars:
        text = _without_middle(text, max_chars)
    if not text.isprintable():
        text = "".join(map(_visible, text))
    return text if len(text) <= max_chars else _without_middle(text, max_chars)


def sentence_of(text: str, max_chars: int = _LONGEST) -> str:
    """Return `printable` text on one line. Line breaks become spaces."""
    return printable(_BREAKS.sub(" ", text), max_chars)


def _without_middle(text: str, max_chars: int) -> str:
    tail = max_chars // 3
    return f"{text[: max_chars - tail - 1]}…{text[-tail:]}"


def _visible(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


class MindSpeedMMError(Exception):
    """The base class. Commands print it as one line and exit with 1.

    Args:
        problem: what is wrong. With `expected`, what was found: `got a list`.
        where: the file, key, line, flag or rank it is about.
        expected: the valid values, as a noun phrase: `a multiple of 16`.
        fix: what to do about it, in the imperative: `set num_frames to 81`.
    """

    def __init__(
        self, problem: str, *, where: str | PathLike[str] = "", expected: str = "", fix: str = ""
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = str(where)
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        where = printable(self.where, _LONGEST_ADDRESS)
        problem, expected, fix = map(sentence_of, (self.problem, self.expected, self.fix))
        if expected and problem.startswith("got "):
            sentence = f"expected {expected}, {problem}"
        else:
            sentence = problem + (f"; expected {expected}" if expected else "")
        return (f"{where}: " if where else "") + sentence + (f"; {fix}" if fix else "")

    def at(self: E, where: str | PathLike[str]) -> E:
        """Return the error within `where`: `part.json` at `data.txt:3` becomes `data.txt:3: part.json`."""
        inside = f": {self.where}" if self.where else ""
        return type(self)(self.problem, where=f"{where}{inside}", expected=self.expected, fix=self.fix)

    def as_kind(self, kind: type[E]) -> E:
        """Return an error of another kind with the same fields."""
        return kind(self.problem, where=self.where, expected=self.expected, fix=self.fix)

    def advise(self: E, fix: str) -> E:
        """Return the error with `fix` added to its advice."""
        fix = f"{self.fix}; {fix}" if self.fix else fix
        return type(self)(self.problem, where=self.where, expected=self.expected, fix=fix)


class ConfigError(MindSpeedMMError):
    """A flag, JSON or YAML value that cannot be used."""


class DataError(MindSpeedMMError):
    """A dataset, clip, mask, caption or feature file that cannot be used."""


class WeightsError(MindSpeedMMError):
    """A checkpoint that is missing, damaged, incomplete or of another model."""


class LaunchError(MindSpeedMMError):
    """Ranks, devices or process groups that do not fit the job."""


class TrainingError(MindSpeedMMError):
    """A run that must not continue.

    Too many iterations in a row were not finite, or its metrics cannot be written.
    """


class NonFiniteError(MindSpeedMMError):
    """Latents or pixels of a video are NaN or infinite; no part of the video is written."""
