"""Settings embedded in a video file: everything needed to generate it again, except its sources. No torch.

The comment of NAME.mp4 is a JSON object whose `vace` key is the version of this format. It uses the keys of
the inference JSON and contains no local paths; `inputs` lists the kinds of sources (video, mask, images, …).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.config.schema import parse
from mindspeed_mm.data.video_writer import read_comment
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import format_json, parse_json
from mindspeed_mm.generation.config import RequestConfig

VERSION = 1
# Keys of a task that are not options: its sources are never embedded.
_SOURCES = frozenset({"type", "videos", "images"})


def embedded(settings: Mapping[str, Any]) -> str:
    """Return the comment for a video generated with `settings`, the content of NAME.json."""
    sampling = {name: value for name, value in settings.get("sampling", {}).items() if name != "grid"}
    values: dict[str, Any] = {"vace": VERSION, "prompt": settings.get("prompt", "")}
    values |= {name: settings[name] for name in ("negative_prompt", "window_prompts") if name in settings}
    task = settings.get("task")
    if isinstance(task, Mapping):
        options = {
            name: value for name, value in task.items() if name not in _SOURCES and not _is_path(value)
        }
        values["task"] = {"type": task["type"], **options}
    inputs = settings.get("inputs") or {}
    if inputs.get("outpaint"):
        values["outpaint"] = inputs["outpaint"]
    values["inputs"] = [name for name, value in inputs.items() if value and name != "outpaint"]
    return format_json({**values, **sampling})


def read_embedded(path: str | Path) -> dict[str, Any]:
    """Read and validate the settings in a video file. They have the keys of the inference JSON.

    Raises DataError if the file has none.
    """
    text = read_comment(path)
    name = Path(path).name
    try:
        values = parse_json(text, name) if text.lstrip().startswith("{") else None
    except ConfigError:
        values = None
    if not isinstance(values, dict) or values.get("vace") != VERSION:
        raise DataError("holds no settings", where=name, expected="a video that vace made")
    known = {key: value for key, value in values.items() if key in RequestConfig.model_fields}
    known = {
        key: value for key, value in known.items() if key != "loras" and not key.endswith(("_path", "_paths"))
    }
    try:
        found = parse(RequestConfig, known, name).model_dump(mode="json", exclude_unset=True)
    except ConfigError as error:
        raise DataError(error.problem, where=name, expected="settings of this version") from None
    given = values.get("inputs")
    return {**found, "inputs": [str(item) for item in given] if isinstance(given, list) else []}


def _is_path(value: Any) -> bool:
    """Return whether a value of a task is a path, or a list that contains one."""
    if isinstance(value, (list, tuple)):
        return any(_is_path(item) for item in value)
    return isinstance(value, str) and "/" in value
