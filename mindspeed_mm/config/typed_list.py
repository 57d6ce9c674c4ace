"""Parses JSON lists whose entries select their schema by `type`, such as `transforms` and `hooks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import json_type
from mindspeed_mm.registry import Registry


class TypedSpec(Protocol):
    """The interface of registry entries."""

    @property
    def config(self) -> type[Config]:
        """The schema of an entry of the list."""


def parse_typed_list(
    values: Any, where: str, registry: Registry[Any], example: str, notes: list[str] | None = None
) -> tuple[Config, ...]:
    """Parse the list at `where` into one config per entry. `registry` contains a TypedSpec for each type.

    `example` is a valid list for error messages. Raises ConfigError with the address of the invalid value.
    """
    if not isinstance(values, list | tuple):
        raise ConfigError(f"got {json_type(values)}", where=where, expected=f"a list such as {example}")
    return tuple(_parse_one(item, f"{where}[{i}]", registry, notes) for i, item in enumerate(values))


def _parse_one(values: Any, where: str, registry: Registry[Any], notes: list[str] | None) -> Config:
    if isinstance(values, Config):
        return values
    name = values.get("type") if isinstance(values, Mapping) else None
    if not isinstance(name, str):
        problem = "it has no type" if isinstance(values, Mapping) else f"got {json_type(values)}"
        raise ConfigError(
            problem, where=where, expected=f"an object whose type is one of {', '.join(registry)}"
        )
    try:
        spec: TypedSpec = registry.get(name)
    except ConfigError as error:
        raise error.at(f"{where}.type") from None
    return parse(spec.config, values, where, notes)
