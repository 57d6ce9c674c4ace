"""What a client may ask for: the keys of the inference JSON that are no paths, and the names other servers use. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.config.schema import parse
from mindspeed_mm.config.values import parse_value
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import RequestConfig, SamplingConfig
from mindspeed_mm.registry import did_you_mean
from mindspeed_mm.serve.uploads import SLOTS

_OURS_ALONE = frozenset({"name", "loras"})  # output names are the server's; LoRAs are paths
FIELDS = tuple(
    name
    for name in RequestConfig.model_fields
    if name not in _OURS_ALONE and not name.endswith(("_path", "_paths"))
)
ALIASES: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "flow_shift": "shift",
    "boundary_ratio": "boundary",
}
COMPUTED: Mapping[str, str] = {
    "model": "the served model, or leave it out",
    "size": "width x height, as 832x480",
    "seconds": "length; num_frames is the nearest 4k+1",
    "extra_params": "an object with more of these fields",
}
_TASK_TEXTS = frozenset({"type", "mode", "label", "caption", "process_type_1", "process_type_2"})
_TEXTS = frozenset({"prompt", "negative_prompt"})
_SIZE = re.compile(r"([0-9]{1,5})\s*[xX*]\s*([0-9]{1,5})")


def read_fields(given: Mapping[str, Any], model: str, *, form: bool) -> dict[str, Any]:
    """A client's fields in the words of the inference JSON, checked. `form`: all values are texts.

    Raises ConfigError for an unknown field, with the nearest known one, and for a value out of its bounds.
    """
    given = dict(given)
    extra = given.pop("extra_params", None)
    if extra is not None:
        extra = parse_value(extra) if isinstance(extra, str) else extra
        if not isinstance(extra, dict):
            raise ConfigError(
                "got no object", where="extra_params", expected="a JSON object with more fields"
            )
        given = {**extra, **given}
    values: dict[str, Any] = {}
    for name, value in given.items():
        key = ALIASES.get(name, name)
        if name in COMPUTED:
            continue
        if key not in FIELDS:
            known = [*FIELDS, *ALIASES, *COMPUTED, *SLOTS]
            raise ConfigError(f"unknown field{did_you_mean(name, known)}", where=f"{name:.60}")
        is_text = (
            form and isinstance(value, str) and key not in _TEXTS
        )  # extra_params holds JSON, a form texts
        if key in values:
            raise ConfigError(f"{name} and {key} are one field", where=name, fix="send one of them")
        values[key] = parse_value(value) if is_text else value
    _check_model(given.get("model"), model)
    if given.get("size") is not None:
        values.update(_read_size(given["size"], values))
    if given.get("seconds") is not None:
        values.update(_read_seconds(given["seconds"], values))
    if not str(values.get("prompt") or "").strip():
        raise ConfigError("is missing", where="prompt", fix="say what the video shows")
    _check_task(values.get("task"))
    request = parse(RequestConfig, values, "request")
    return request.model_dump(mode="json", exclude_unset=True)


def _check_task(task: Any) -> None:
    """Refuse options of a task that are paths: texts of any kind, but for the few that name no file."""
    if not isinstance(task, dict) or task.get("type") not in TASKS:
        return
    fields = TASKS.get(task["type"]).options.model_fields
    for name in task.keys() & fields.keys() - _TASK_TEXTS:
        if _holds_text(fields[name].annotation):
            fix = "upload src_mask" if name == "mask" else "leave it out"
            raise ConfigError("is a path, which a request cannot name", where=f"task.{name}", fix=fix)


def _holds_text(annotation: Any) -> bool:
    return annotation is str or any(map(_holds_text, get_args(annotation)))


def _check_model(name: Any, served: str) -> None:
    if name not in (None, "", served):
        raise ConfigError(f"got {name!r:.80}", where="model", expected=f"{served!r}, which this server has")


def _read_size(size: Any, values: Mapping[str, Any]) -> dict[str, int]:
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise ConfigError(f"got {size!r:.80}", where="size", expected="a text such as 832x480")
    if {"width", "height"} & values.keys():
        raise ConfigError("is given beside width or height", where="size", fix="send one of them")
    return {"width": int(found[1]), "height": int(found[2])}


def _read_seconds(seconds: Any, values: Mapping[str, Any]) -> dict[str, int]:
    if "num_frames" in values:
        raise ConfigError("is given beside num_frames", where="seconds", fix="send one of them")
    try:
        length = float(seconds)
        frames = length * float(values.get("fps", SamplingConfig().fps))
    except (TypeError, ValueError):
        raise ConfigError(f"got {seconds!r:.80}", where="seconds", expected="a number of seconds") from None
    if not 0 < frames <= 10001:
        raise ConfigError(f"got {seconds!r:.80}", where="seconds", expected="1 to 10001 frames in that time")
    return {"num_frames": max(1, round((frames - 1) / 4) * 4 + 1)}
