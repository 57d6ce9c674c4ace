"""Reads the inference JSONs of MindSpeed-MM, which have no prompt."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import (
    MINDSPEED_PROMPT,
)

# All keys of MindSpeed-MM's inference JSONs.
_MINDSPEED_KEYS = {
    "model",
    "video_path",
    "image_path",
    "output_path",
}


def as_mindspeed(values: dict[str, Any], keys: set[str], notes: list[str]) -> dict[str, Any]:
    """Add MindSpeed-MM's videos, for preset mindspeed and for an inference JSON of MindSpeed-MM.

    The videos use the control video, the reference image, or both, if these are given.

    `keys` are the keys of the file, without the flags.
    """
    is_theirs = {"model", "output_path"} < keys <= _MINDSPEED_KEYS
    by_keys = is_theirs and not {"prompt", "prompts_file", "preset", "from_latents"} & values.keys()
    if not by_keys and values.get("preset") != "mindspeed":
        return values
    made = {"preset": "mindspeed", "prompt": MINDSPEED_PROMPT, **values}
    if values.get("tasks") is None and values.get("prompts_file") is None:
        control, reference = {"name": "video1", "image_path": None}, {"name": "video2", "video_path": None}
        inputs = (values.get("video_path") is not None, values.get("image_path") is not None)
        both = [control, reference, {"name": "video3"}]
        made["tasks"] = {(True, False): [control], (False, True): [reference], (True, True): both}.get(
            inputs, [{}]
        )
    notes.append(
        f"preset mindspeed{' (no prompt, and only the keys of MindSpeed-MM)' if by_keys else ''}: "
        f"{len(made.get('tasks') or [{}])} video(s), seed 1, 15 fps, DiffSynth-Studio's sampling"
        + ("" if "prompt" in values else f"; prompt {MINDSPEED_PROMPT}; pass --prompt for your own")
    )
    return made


def suggest_mindspeed(values: dict[str, Any], keys: set[str], where: str) -> None:
    """Raise ConfigError for a JSON without a prompt that resembles one of MindSpeed-MM."""
    given_here = {key for key, value in values.items() if value is not None}
    if given_here & {"prompt", "prompts_file", "tasks", "from_latents"} or not keys & {
        "video_path",
        "image_path",
    }:
        return
    if others := sorted(keys - _MINDSPEED_KEYS):
        raise ConfigError(
            "missing",
            where=f"{where}:prompt",
            fix=(
                "set prompt or --prompt, or, for the videos of MindSpeed-MM's inference JSONs, --preset "
                f"mindspeed (this file is not one of them, as it has {', '.join(others)})"
            ),
        )
