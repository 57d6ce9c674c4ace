"""Fields whose value is one of several names: the values of a Literal, or the entries of a registry."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from mindspeed_mm.registry import Registry


class NameIn:
    """`Annotated[str, NameIn(SOLVERS)]`: the name of an entry, checked when a value is read.

    Names registered by other packages are also valid. Their code is not imported.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.registry.names())}

    def _check(self, value: Any) -> Any:
        if value in self.registry:
            return value
        *rest, last = map(repr, self.registry.names())
        expected = f"{', '.join(rest)} or {last}" if rest else last
        raise PydanticKnownError("literal_error", {"expected": expected})


def names_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the names that a field accepts, in order, or () if it also accepts other values."""
    for mark in field.metadata:
        if isinstance(mark, NameIn):
            return mark.registry.names()
    annotation: Any = field.annotation
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return values if all(isinstance(value, str) for value in values) else ()
