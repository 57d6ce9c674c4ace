"""The base of every config: frozen, keyword-only, unknown keys refused, errors with an address."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen set of named values. Declare it beside the code that reads it; derived values are properties.

    UNUSED names keys that stand in published files and mean nothing here, each with the reason. They are accepted and
    collected into the validation context's list of notes, which the task prints once.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=False, protected_namespaces=(), allow_inf_nan=False
    )
    UNUSED: ClassVar[Mapping[str, str]] = {}

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
    """Plain values → `schema`. `where` starts the address of an error (a file name); `notes` collects unused keys.

    Raises ConfigError listing every problem in one line: `pretrain_model.json:predictor.num_head: unknown key (…)`.
    """
    found: list[str] = []
    try:
        config = schema.model_validate(values, context=found)
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(schema, where, dict(item)) for item in error.errors())) from None
    if notes is not None:
        notes += [f"{where}:{note}" for note in dict.fromkeys(found)]
    return config


def _problem(schema: type[BaseModel], where: str, item: dict[str, Any]) -> str:
    unknown = item["type"] == "extra_forbidden"
    *path, last = item["loc"] or [""]
    location = [part for part in path if not _is_type_tag(part)]
    location += [last] if unknown or not _is_type_tag(last) else []
    joint = "." if ":" in Path(where).name else ":"  # `where` may lead into a file already: data.json:dataset_param
    address = joint.join(filter(None, [where, _dotted(location)]))
    if unknown:
        known = _known_keys(schema, location[:-1])
        return f"{address}: unknown key{did_you_mean(str(location[-1]), known)}"
    if item["type"] == "missing":
        return f"{address}: missing; it is required"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    found = f" (found {value!r})" if isinstance(value, (str, int, float, bool, type(None))) else ""
    return f"{address}: {message}{found}"


def _is_type_tag(part: object) -> bool:
    """Whether pydantic put this part there to say which type of a union it tried, as in `tuple[str, ...]`."""
    return isinstance(part, str) and (not part or "[" in part)


def _dotted(location: list[Any]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else ("." if text else "") + str(part)
    return text


def _known_keys(schema: type[BaseModel], location: list[Any]) -> list[str]:
    """The keys that the config at `location` knows; [] where the path leads through something that is no config."""
    current: type[BaseModel] | None = schema
    for part in location:
        if isinstance(part, int):
            continue
        if current is None or part not in current.model_fields:
            return []
        current = _config_in(current.model_fields[part].annotation)
    return list(current.model_fields) if current else []


def _config_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _config_in(inner)
        if found is not None:
            return found
    return None
