"""Base class of configs: frozen, keyword-only, strict about unknown keys, with addresses in errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import json_type
from mindspeed_mm.registry import did_you_mean

C = TypeVar("C", bound="Config")
_LARGEST = (1 << 63) - 1  # upper bound of every number; fields may have tighter bounds


# pydantic's error type → what was expected
_EXPECTED: Mapping[str, str] = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "string_too_short": "a string of at least {min_length} character(s)",
    "string_unicode": "a string without lone surrogates",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "none_required": "null",
    "string_pattern_mismatch": "a string that matches {pattern}",
    "string_too_long": "a string of at most {max_length} characters",
    "too_long": "a list of at most {max_length} entries",
    "too_short": "a list of at least {min_length} entries",
}


class Config(BaseModel):
    """A frozen set of named values.

    Declare a config next to the code that reads it. Derived values are properties.

    UNUSED maps keys of published files that have no effect here to the reason. They are accepted
    and added to the notes in the validation context, which the task logs once.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=False,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
    UNUSED: ClassVar[Mapping[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject booleans, which Python treats as numbers, and numbers that are too large for any run."""
        field = cls.model_fields[str(info.field_name)]
        annotation: Any = field.annotation
        kinds = _scalar_kinds(annotation)
        is_bounded = any(hasattr(rule, "le") or hasattr(rule, "lt") for rule in field.metadata)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"expected a number, got {str(item).lower()}")
            if is_bounded or (isinstance(item, float) and not math.isfinite(item)):
                continue  # another rule rejects it
            if kinds & {int, float} and isinstance(item, (int, float)) and abs(item) > _LARGEST:
                raise ValueError(f"expected a number of at most {_LARGEST}, got {str(item)[:40]}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unused(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, Mapping):
            return values
        unused = [key for key in values if key in cls.UNUSED and key not in cls.model_fields]
        if isinstance(info.context, list):
            info.context.extend(f"{key}: accepted, unused: {cls.UNUSED[key]}" for key in unused)
        return {key: value for key, value in values.items() if key not in unused}


def parse(schema: type[C], values: object, where: str, notes: list[str] | None = None) -> C:
    """Validate plain values against `schema`.

    `where` is the start of error addresses, such as a file name. `notes` collects unused keys.

    Raises ConfigError listing every problem in one line: `pretrain_model.json:predictor.num_head: unknown key
    (…)`.
    """
    found: list[str] = []
    try:
        config = schema.model_validate(values, context=found)
    except ValidationError as error:
        items = [dict(item) for item in error.errors()]
        problems = [_problem(schema, where, item) for item in items if not _is_consequence(item)]
        raise problems[0] if len(problems) == 1 else ConfigError("; ".join(map(str, problems))) from None
    if notes is not None:
        notes += [f"{where}:{note}" for note in dict.fromkeys(found)]
    return config


def _problem(schema: type[BaseModel], where: str, item: dict[str, Any]) -> ConfigError:
    unknown = item["type"] == "extra_forbidden"
    *path, last = item["loc"] or [""]
    location = [part for part in path if not _is_type_tag(part)]
    location += [last] if unknown or not _is_type_tag(last) else []
    # `where` may already point into a file: data.json:dataset_param.
    joint = "." if ":" in Path(where).name else ":"
    address = joint.join(filter(None, [where, _dotted(location)]))
    if unknown:
        known = _known_keys(schema, location[:-1])
        return ConfigError(f"unknown key{did_you_mean(str(location[-1]), known)}", where=address)
    if item["type"] == "missing":
        return ConfigError("missing; it is required", where=address)
    value = item.get("input")
    if item["type"] in _EXPECTED:
        context = item.get("ctx", {})
        got = context.get("actual_length", _shown(value))  # the number of items for a long list
        expected = _EXPECTED[item["type"]].format(**context)
        return ConfigError(f"got {got}", where=address, expected=expected)
    message = item["msg"].removeprefix("Value error, ")
    found = (
        "" if ", got " in message or not isinstance(value, (str, int, float)) else f" (found {_shown(value)})"
    )
    return ConfigError(f"{message}{found}", where=address)


def _shown(value: object) -> str:
    if value is None or isinstance(value, (bool, dict, list, tuple)):
        return json_type(list(value) if isinstance(value, tuple) else value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _is_consequence(item: Mapping[str, Any]) -> bool:
    """Return whether an error follows from another: pydantic also calls a list of invalid items short."""
    return bool(item["type"] == "too_short" and len(item["input"]) > item["ctx"]["actual_length"])


@functools.cache
def _scalar_kinds(annotation: Any) -> frozenset[type]:
    """Return the scalar types in an annotation, including the types of a Literal's values."""
    if get_origin(annotation) is Literal:
        return frozenset(map(type, get_args(annotation)))
    if isinstance(annotation, type):
        return frozenset({annotation})
    return frozenset(kind for inner in get_args(annotation) for kind in _scalar_kinds(inner))


def _is_type_tag(part: object) -> bool:
    """Return whether pydantic added this part to name a tried union member, such as `tuple[str, ...]`."""
    return isinstance(part, str) and (not part or "[" in part)


def _dotted(location: list[Any]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else ("." if text else "") + str(part)
    return text


def _known_keys(schema: type[BaseModel], location: list[Any]) -> list[str]:
    """Return the keys of the config at `location`, or [] if the path leaves the configs."""
    current: type[BaseModel] | None = schema
    is_key = False  # the next part is the key of a mapping, not a field
    for part in location:
        if isinstance(part, int) or is_key:
            is_key = False
            continue
        if current is None or part not in current.model_fields:
            return []
        annotation: Any = current.model_fields[part].annotation
        current, is_key = _config_in(annotation), get_origin(annotation) is dict
    return list(current.model_fields) if current else []


def _config_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _config_in(inner)
        if found is not None:
            return found
    return None
