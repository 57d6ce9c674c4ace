"""Patterns of module names: endings at a dot, with `*` for any text. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean


def matching(patterns: Sequence[str], names: Iterable[str], where: str) -> list[str]:
    """The names that end in one of `patterns` at a dot, in their own order; `*` stands for any text.

    `q` matches `blocks.0.self_attn.q` but not `norm_q`. Raises ConfigError for a pattern that matches nothing.
    """
    known = list(names)
    hits = {pattern: {name for name in known if ends_in(name, pattern)} for pattern in patterns}
    for pattern, found in hits.items():
        if not found:
            endings = sorted({part for name in known for part in (name, name.rpartition(".")[2])})
            raise ConfigError(f"{pattern!r} matches no module{did_you_mean(pattern, endings)}", where=where)
    return [name for name in known if any(name in found for found in hits.values())]


def ends_in(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern`, or ends in it at a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
