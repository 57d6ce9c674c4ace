"""The settings within a video file: what makes it again, without its sources. No torch.

The comment of NAME.mp4 is a JSON object whose `vace` is the version of this format. It holds the words of the
inference JSON and no path of the machine that made the video; `inputs` lists what it started from (video,
mask, images, …).
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
_SOURCES = frozenset({"type", "videos", "images"})  # of a task: what it starts from, which no file says


def embedded(settings: Mapping[str, Any]) -> str:
    """The comment for a video made with `settings` (NAME.json)."""
    sampling = {name: value for name, value in settings.get("sampling", {}).items() if name != "grid"}
    said: dict[str, Any] = {"vace": VERSION, "prompt": settings.get("prompt", "")}
    said |= {name: settings[name] for name in ("negative_prompt", "window_prompts") if name in settings}
    task = settings.get("task")
    if isinstance(task, Mapping):
        options = {
            name: value for name, value in task.items() if name not in _SOURCES and not _is_path(value)
        }
        said["task"] = {"type": task["type"], **options}
    inputs = settings.get("inputs") or {}
    if inputs.get("outpaint"):
        said["outpaint"] = inputs["outpaint"]
    said["inputs"] = [name for name, value in inputs.items() if value and name != "outpaint"]
    return format_json({**said, **sampling})


def read_embedded(path: str | Path) -> dict[str, Any]:
    """The settings in a video file, in the words of the inference JSON, checked.

    Raises DataError when there are none.
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
    """Whether a value of a task is a path, or a list of some."""
    if isinstance(value, (list, tuple)):
        return any(_is_path(item) for item in value)
    return isinstance(value, str) and "/" in value
