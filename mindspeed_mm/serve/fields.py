"""The fields of a request: inference JSON keys that are not paths, and aliases used by other servers.

Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mindspeed_mm.config.schema import parse
from mindspeed_mm.config.values import parse_value
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.geometry import WAN
from mindspeed_mm.registry import did_you_mean
from mindspeed_mm.serve.loras import Loras
from mindspeed_mm.serve.uploads import SLOTS

_OURS_ALONE = frozenset({"name"})  # the server chooses the names of outputs
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
    "model": "name of the served model (default: the served model)",
    "size": "width x height, as 832x480",
    "seconds": "length in seconds; num_frames is the nearest 4k+1",
    "extra_params": "object with additional fields of this request",
}
SAFE_TASK_TEXTS = frozenset({"type", "mode", "label", "caption", "process_type_1", "process_type_2"})
_SAFE_TEXT = re.compile(
    r"left|right|up|down|true|false|[0-9.,:-]*|(?:left|right|up|down)(?:,(?:left|right|up|down))*"
)
_LONGEST = 20_000  # maximum characters of all prompts, far more than the text encoder reads
_TEXTS = frozenset({"prompt", "negative_prompt"})
_SIZE = re.compile(r"([0-9]{1,5})\s*[xX*]\s*([0-9]{1,5})")


def read_fields(
    given: Mapping[str, Any],
    model: str,
    *,
    form: bool,
    fps: float | None = None,
    loras: Loras | None = None,
) -> dict[str, Any]:
    """Check a client's fields, and return them as keys of the inference JSON.

    `form`: whether all values are strings. `fps`: the server's fps, which converts `seconds` to frames.
    `loras`: the LoRAs that a request may name.

    Raises ConfigError for an unknown field, with the nearest known one, and for an invalid value.
    """
    given = dict(given)
    extra = given.pop("extra_params", None)
    if extra is not None:
        extra = parse_value(extra) if isinstance(extra, str) else extra
        if not isinstance(extra, dict):
            raise ConfigError(
                "got no object", where="extra_params", expected="a JSON object with additional fields"
            )
        given = {**extra, **given}
    values: dict[str, Any] = {}
    for name, value in given.items():
        key = ALIASES.get(name, name)
        if name in COMPUTED:
            continue
        if name in SLOTS:
            raise ConfigError(
                "is a file", where=name, fix="send a form (multipart/form-data) with the file in it"
            )
        if key not in FIELDS:
            known = [*FIELDS, *ALIASES, *COMPUTED, *SLOTS]
            raise ConfigError(f"unknown field{did_you_mean(name, known)}", where=f"{name:.60}")
        # Form values are strings that may contain JSON.
        is_text = form and isinstance(value, str) and key not in _TEXTS
        if key in values:
            raise ConfigError(f"{name} and {key} are the same field", where=name, fix="send one of them")
        values[key] = parse_value(value) if is_text else value
        if _holds_nul(values[key]):
            raise ConfigError("contains a NUL character", where=name, fix="send text without it")
    _check_model(given.get("model"), model)
    if given.get("size") is not None:
        values.update(_read_size(given["size"], values))
    if given.get("seconds") is not None:
        values.update(_read_seconds(given["seconds"], values, fps or SamplingConfig().fps))
    if not str(values.get("prompt") or "").strip():
        raise ConfigError("is missing", where="prompt", fix="describe the video")
    request = _parsed(values)
    _check_task(request.task)
    if request.loras:
        (loras or Loras(None)).check([lora.model_dump() for lora in request.loras])
    texts = (request.prompt, request.negative_prompt, *(request.window_prompts or ()))
    if sum(len(text or "") for text in texts) > _LONGEST:
        raise ConfigError("is too long", where="prompt", expected=f"at most {_LONGEST} characters")
    return request.model_dump(mode="json", exclude_unset=True)


def _parsed(values: Mapping[str, Any]) -> RequestConfig:
    """Parse `values`. Raises ConfigError with the first invalid field as `where`."""
    try:
        return parse(RequestConfig, values, "request")
    except ConfigError as error:
        if error.where:
            where = error.where.removeprefix("request:").removeprefix("request")
            raise ConfigError(error.problem, where=where, expected=error.expected, fix=error.fix) from None
        # With several problems, the text starts with the name of the first field.
        name, _, problem = error.problem.removeprefix("request:").partition(": ")
        raise ConfigError(problem, where=name) from None


def _check_task(task: Any) -> None:
    """Raise ConfigError for task options that could be paths: all strings except a few safe ones."""
    values = {} if not isinstance(task, dict) else task
    for name, value in values.items():
        if name not in SAFE_TASK_TEXTS and _holds_text(value):
            fix = "upload src_mask" if name == "mask" else "remove it"
            raise ConfigError("could be a path, which a request cannot name", where=f"task.{name}", fix=fix)


def _holds_text(value: Any) -> bool:
    """Return whether a value contains a string that is not one of a few safe words."""
    if isinstance(value, str):
        return _SAFE_TEXT.fullmatch(value) is None
    if isinstance(value, dict):
        return any(map(_holds_text, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_holds_text, value))


def _holds_nul(value: Any) -> bool:
    """Return whether a string or key in a value contains a NUL character."""
    if isinstance(value, dict):
        return any(map(_holds_nul, (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value


def _check_model(name: Any, served: str) -> None:
    if name not in (None, "", served):
        raise ConfigError(
            f"got {name!r:.80}", where="model", expected=f"{served!r}, the model of this server"
        )


def _read_size(size: Any, values: Mapping[str, Any]) -> dict[str, int]:
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise ConfigError(f"got {size!r:.80}", where="size", expected="a string such as 832x480")
    if {"width", "height"} & values.keys():
        raise ConfigError("is given beside width or height", where="size", fix="send one of them")
    return {"width": int(found[1]), "height": int(found[2])}


def _read_seconds(seconds: Any, values: Mapping[str, Any], fps: float) -> dict[str, int]:
    if "num_frames" in values:
        raise ConfigError("is given beside num_frames", where="seconds", fix="send one of them")
    try:
        if isinstance(seconds, bool):  # float() would accept it as 0 or 1
            raise TypeError
        length = float(seconds)
        frames = length * float(fps if values.get("fps") is None else values["fps"])
    except (TypeError, ValueError):
        raise ConfigError(f"got {seconds!r:.80}", where="seconds", expected="a number of seconds") from None
    if not 0 < frames <= 10001:
        raise ConfigError(f"got {seconds!r:.80}", where="seconds", expected="1 to 10001 frames in that time")
    return {"num_frames": max(1, WAN.video_frames(round((frames - 1) / WAN.stride[0]) + 1))}
