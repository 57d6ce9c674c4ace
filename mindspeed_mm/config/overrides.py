"""Implements `--set a.b=value`, which replaces nested keys of a JSON or YAML file before validation.

Flags take precedence over these keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from mindspeed_mm.config.schema import Config
from mindspeed_mm.config.values import parse_value
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import json_type
from mindspeed_mm.registry import did_you_mean

_KEY = re.compile(r"[^.\[\]]+|\[\d+\]")
_PATH = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[\d+\])*")


class OverrideConfig(Config):
    """The flag `--set`, as a config field."""

    set: tuple[str, ...] = Field(
        default=(),
        description=("FILE.KEY=VALUE: replace a nested key, such as model.predictor.dtype=fp32; repeatable"),
        json_schema_extra={"repeated": True},
    )


@dataclass(frozen=True)
class Override:
    """One replacement: the word on the command line, its keys from outermost to innermost, the value."""

    word: str
    keys: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class Overrides:
    """All replacements of `--set`, by file."""

    items: tuple[Override, ...] = ()
    files: tuple[str, ...] = ()  # the names that a key may begin with; empty if the command reads one file

    @classmethod
    def parse(cls, words: Sequence[str], files: Sequence[str] = ()) -> Overrides:
        """Parse words such as `model.predictor.dtype=fp32` (a key of file `model`). Raises ConfigError."""
        return cls(tuple(_parse_override(word, files) for word in words), tuple(files))

    def apply(self, values: Any, file: str = "") -> Any:
        """Return a copy of `values`, the content of one file, with keys replaced. Raises ConfigError."""
        for item in self.items:
            if not self.files:
                values = _replaced(values, item.keys, item)
            elif item.keys[0] == file:
                values = _replaced(values, item.keys[1:], item)
        return values


def _parse_override(word: str, files: Sequence[str]) -> Override:
    path, equals, text = word.partition("=")
    if not equals or not _PATH.fullmatch(path):
        example = f"{files[0]}.key=value" if files else "key=value, tasks[0].key=value"
        raise ConfigError(
            "no value is given",
            where=f"--set {word[:80]}",
            expected=example,
            fix="write the key, an equals sign and the value",
        )
    keys = tuple(key.strip("[]") for key in _KEY.findall(path))
    if files and (keys[0] not in files or len(keys) < 2):
        near = did_you_mean(keys[0], list(files)) if keys[0] not in files else ""
        raise ConfigError(
            f"got {path[:40]!r}{near}",
            where=f"--set {word[:80]}",
            expected=f"a key that begins with {', '.join(f'{name}.' for name in files)}",
            fix="settings that are in no file have their own flags",
        )
    return Override(word, keys, parse_value(text))


def _replaced(values: Any, keys: tuple[str, ...], item: Override) -> Any:
    if not keys:
        return item.value
    first, *rest = keys
    if values is None:
        values = {}
    if isinstance(values, dict):
        return {**values, first: _replaced(values.get(first), tuple(rest), item)}
    if isinstance(values, list) and first.isdigit() and int(first) < len(values):
        at = int(first)
        return [*values[:at], _replaced(values[at], tuple(rest), item), *values[at + 1 :]]
    if isinstance(values, list):
        raise ConfigError(
            f"got {first!r}", where=f"--set {item.word[:80]}", expected=f"an index below {len(values)}"
        )
    raise ConfigError(
        f"{first!r} cannot be set: the value above it is {json_type(values)}", where=f"--set {item.word[:80]}"
    )
