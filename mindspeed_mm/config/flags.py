"""Turns config fields into flags: `adam_beta1` becomes `--adam-beta1`, with its help and type."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterable
from typing import Any, Literal, NoReturn, TypeGuard, Union, get_args, get_origin

from mindspeed_mm.config.names import names_of
from mindspeed_mm.config.schema import Config
from mindspeed_mm.config.values import parse_value
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean


class FlagParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations.

    Its errors are ConfigErrors (one line, exit code 1) that name the nearest flag.
    """

    def __init__(self, prog: str, description: str, *, add_help: bool = True) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=add_help)

    def error(self, message: str) -> NoReturn:
        # A list of choices can be long.
        short = message if len(message) <= 600 else f"{message[:300]}…{message[-200:]}"
        raise ConfigError(short, where=self.prog, fix=f"see {self.prog} --help")

    def parse_strict(self, argv: Iterable[str]) -> argparse.Namespace:
        """Parse all of `argv`. Raises ConfigError for an unknown flag."""
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            flag = unknown[0].split("=")[0]
            raise ConfigError(f"unknown argument {flag!r}{did_you_mean(flag, self.flags())}", where=self.prog)
        return namespace

    def flags(self) -> list[str]:
        """Return every flag of this parser, sorted."""
        return sorted(self._option_string_actions)


def flag_name(field: str) -> str:
    """Convert `adam_beta1` to `--adam-beta1`."""
    return "--" + field.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, schema: type[Config], title: str) -> None:
    """Add one flag for each field of `schema`.

    A flag that is not given is absent from the namespace, so the field's default applies. A field that is
    itself a config gets no flag; add its fields in a separate call.
    """
    group = parser.add_argument_group(title)
    for name, field in schema.model_fields.items():
        if is_config(field.annotation):
            continue
        group.add_argument(
            flag_name(name), dest=name, default=argparse.SUPPRESS, help=_help(field), **_kind_of(field)
        )


def given(namespace: argparse.Namespace, schema: type[Config]) -> dict[str, Any]:
    """Return the fields of `schema` that were given as flags."""
    return {name: value for name, value in vars(namespace).items() if name in schema.model_fields}


def _help(field: Any) -> str:
    text = field.description or ""
    if not (field.is_required() or field.default in (None, False, ()) or "(default: " in text):
        text += f" (default: {field.default})"
    return text.replace("%", "%%")


def is_config(annotation: Any) -> TypeGuard[type[Config]]:
    """Return whether a type is a config."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def numbers(word: str) -> float | tuple[float, ...]:
    """Parse one number (`0.5`) or several (`1,0.8,0.5`)."""
    values = tuple(map(float, word.split(",")))
    return values if len(values) > 1 else values[0]


def _kind_of(field: Any) -> dict[str, Any]:
    """Return the argparse keywords for a field.

    A field that is true by default also gets `--no-…`. A flag that may be repeated collects its values.
    """
    if (field.json_schema_extra or {}).get("repeated"):
        return {"action": "append", "metavar": "KEY=VALUE"}
    if field.annotation is bool and field.default is True:
        return {"action": argparse.BooleanOptionalAction}
    if field.annotation is str and (names := names_of(field)):
        return {"choices": names, "type": str}
    return _kind(field.annotation)


def _kind(annotation: Any) -> dict[str, Any]:
    """Return the argparse keywords for a field's type."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [arg for arg in get_args(annotation) if arg is not type(None)]
        if float in inner and any(get_origin(arg) is tuple for arg in inner):
            # Take one word only, because the next may be a file.
            return {"type": numbers, "metavar": "X[,X…]"}
        return _kind(inner[0])
    if annotation is bool:
        return {"action": "store_true"}
    if get_origin(annotation) is list:
        return {"type": parse_value, "metavar": "JSON"}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation), "type": type(get_args(annotation)[0])}
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        if get_origin(inner) is tuple:
            return {"type": parse_value, "metavar": "JSON"}
        return {"nargs": "+", **_kind(inner)}
    return {"type": annotation if annotation in (int, float) else str}
