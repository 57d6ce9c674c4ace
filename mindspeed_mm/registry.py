"""A registry of named entries that other packages extend through entry points. Imports only used entries."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from mindspeed_mm.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The entries of a kind. `group` is the entry-point group in which other packages add theirs.

    Another package adds one with `entry_points={"mindspeed_mm.models": ["mine = my_pkg:SPEC"]}`.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def add(self, name: str, entry: T) -> T:
        """Add an entry, and return it. Raises ConfigError if the name is taken by another one."""
        if self._entries.setdefault(name, entry) is not entry:
            raise ConfigError(f"{self.kind} {name!r} is registered twice", fix="rename one of them")
        return entry

    def alias(self, short: str, name: str) -> None:
        """Add another name for an entry. It is not listed, and an entry of that name takes precedence."""
        self._aliases[short] = name

    def get(self, name: str) -> T:
        """Return the entry `name` from this package, else from installed packages, else by an alias.

        Raises ConfigError with the nearest known name.
        """
        if name in self._entries:
            return self._entries[name]
        for point in entry_points(group=self.group):
            if point.name == name:
                loaded: T = point.load()
                return loaded
        if name in self._aliases:
            return self.get(self._aliases[name])
        raise ConfigError(
            f"unknown {self.kind} {name!r}{did_you_mean(name, self)}", expected=f"one of {', '.join(self)}"
        )

    def names(self) -> tuple[str, ...]:
        """Return the names from this package in the order of addition, then the others, sorted."""
        return (*self._entries, *(name for name in self if name not in self._entries))

    def __iter__(self) -> Iterator[str]:
        yield from sorted({*self._entries, *(point.name for point in entry_points(group=self.group))})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or name in set(self))


def did_you_mean(word: str, known: Iterator[str] | Registry[Any] | list[str]) -> str:
    """Return ` (did you mean 'num_heads'?)`, or "" if no known word is similar. Ignores case."""
    plain = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word[:200].lower(), list(plain), n=1, cutoff=0.6)
    return f" (did you mean {plain[nearest[0]]!r}?)" if nearest else ""


def resolve(reference: str) -> Any:
    """Import `package.module:name` and return the object.

    Entries refer to their code this way, so that --help imports little.
    """
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
