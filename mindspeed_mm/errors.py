"""Everything this package raises on bad input, in one tree.

MindSpeedMMError
├── ConfigError    a flag, JSON or YAML value: unknown, misspelt, out of range, contradicting another
├── DataError      a dataset, clip, mask, caption or feature file
├── WeightsError   a checkpoint: missing, damaged, of another model, in another dialect
├── LaunchError    ranks, devices, process groups, a folder that another run writes to
├── TrainingError  a run that must not go on: too many iterations in a row were not finite, no room for its metrics
└── NonFiniteError a video whose latents or pixels are NaN or infinite

An error is data: where, what is wrong, what was expected and what to do. `str(error)` puts them into one line:

    DataError("src_mask has 40 frames, src_video has 81", where="data.json[17]", fix="cut both to one length")
    data.json[17]: src_mask has 40 frames, src_video has 81; cut both to one length

    ConfigError("got a list", where="vace.json", expected="a JSON object with the keys model and prompt")
    vace.json: expected a JSON object with the keys model and prompt, got a list
"""

from __future__ import annotations

from os import PathLike
from typing import TypeVar

E = TypeVar("E", bound="MindSpeedMMError")


class MindSpeedMMError(Exception):
    """The root. Commands print it as one line and exit with 1.

    Args:
        problem: what is wrong. With `expected`, what was found: `got a list`.
        where: the file, key, line, flag or rank it is about.
        expected: what would have been right, without a verb: `a multiple of 16`.
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
        if self.expected and self.problem.startswith("got "):
            sentence = f"expected {self.expected}, {self.problem}"
        else:
            sentence = self.problem + (f"; expected {self.expected}" if self.expected else "")
        return (f"{self.where}: " if self.where else "") + sentence + (f"; {self.fix}" if self.fix else "")

    def at(self: E, where: str | PathLike[str]) -> E:
        """The same error, its address inside `where`: `part.json` at `data.txt:3` is `data.txt:3: part.json`."""
        inside = f": {self.where}" if self.where else ""
        return type(self)(self.problem, where=f"{where}{inside}", expected=self.expected, fix=self.fix)


class ConfigError(MindSpeedMMError):
    """A flag, JSON or YAML value that cannot be honoured."""


class DataError(MindSpeedMMError):
    """A dataset, clip, mask, caption or feature file that cannot be used."""


class WeightsError(MindSpeedMMError):
    """A checkpoint that is missing, damaged, incomplete or of another model."""


class LaunchError(MindSpeedMMError):
    """Ranks, devices or process groups that do not fit the job."""


class TrainingError(MindSpeedMMError):
    """A run that must not go on: too many iterations in a row were not finite, or its metrics cannot be written."""


class NonFiniteError(MindSpeedMMError):
    """Latents or pixels of a video are NaN or infinite: nothing of it is written."""
