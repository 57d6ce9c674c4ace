"""Lists the videos of an inference JSON: a single video, its tasks, or a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import parse_json, read_text
from mindspeed_mm.generation.config import (
    InferenceConfig,
)
from mindspeed_mm.tasks.jobs.find_inputs import PathFinder
from mindspeed_mm.text_encoding import split_lines


def task_rows(
    config: InferenceConfig, values: dict[str, Any], finder: PathFinder, where: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the keys of each video, and where errors locate each video."""
    if config.prompts_file is not None:
        if config.tasks is not None:
            raise ConfigError("tasks and prompts_file are both given", where=where, fix="keep one of them")
        return _prompts(Path(finder.find("prompts_file", config.prompts_file)))
    if config.tasks is not None:
        return list(values["tasks"]), [f"{where}:tasks[{index}]" for index in range(len(config.tasks))]
    return [{}], [where]


def _prompts(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    tasks: list[dict[str, Any]] = []
    where: list[str] = []
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        text = line.strip()
        if not text or (text.startswith("#") and path.suffix != ".jsonl"):
            continue
        where.append(f"{path.name}:{number}")
        tasks.append(_task_line(text, path.name, number) if path.suffix == ".jsonl" else {"prompt": text})
    if not tasks:
        raise ConfigError("contains no prompt", where=path, fix="write one per line")
    return tasks, where


def _task_line(text: str, name: str, number: int) -> dict[str, Any]:
    task = parse_json(text, name, line=number)
    if not isinstance(task, dict):
        raise ConfigError(
            f"got {text[:40]!r}", where=f"{name}:{number}", expected='an object such as {"prompt": "…"}'
        )
    return task


def inherited(top: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Return the top-level keys overridden by the keys of a task.

    `image_path` and `image_paths` set the same input, so either key in the task replaces both.
    """
    taken = dict(top)
    if {"image_path", "image_paths"} & task.keys():
        taken.pop("image_path", None)
        taken.pop("image_paths", None)
    return {**taken, **task}
