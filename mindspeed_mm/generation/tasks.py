"""The `task` of a request.

It prepares src_video, src_mask and references from a plain clip or image before generation. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.prepared import describe, write_files
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.conditioning.tasks.options import ANNOTATORS_FOLDER
from mindspeed_mm.conditioning.tasks.spec import Sources, Task, count_bounds
from mindspeed_mm.data.sample import Inputs
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import format_json, json_type
from mindspeed_mm.generation.request import TaskRequest


def request_task(value: Any, inputs: Inputs, where: str) -> tuple[TaskRequest, Inputs]:
    """Parse `inpainting` or `{"type": "inpainting", "mode": …}`. Returns the task and the remaining inputs.

    The task consumes video_path, mask_path and, if it needs images, the images. Raises ConfigError for an
    unknown task or option, and for a missing source or network.
    """
    values = {"type": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    if not isinstance(values.get("type"), str):
        raise ConfigError(
            f"got {json_type(value)}", where=where, expected='a task, or {"type": "inpainting", "mode": …}'
        )
    if inputs.has_ends or inputs.outpaint is not None:
        key = "outpaint" if inputs.outpaint is not None else "first_frame_path/last_frame_path"
        raise ConfigError(f"contradicts {key}", where=where, fix="keep one of them")
    try:
        task = TASKS.get(values.pop("type"))
    except ConfigError as error:
        raise error.at(where) from None
    if inputs.src_mask is not None:
        if "mask" not in task.options.model_fields:
            raise ConfigError(f"task {task.name} takes no mask", where=where, fix="remove mask_path")
        values.setdefault("mask", str(inputs.src_mask))
    options = task.parse(values, where)
    videos = () if inputs.src_video is None else (str(inputs.src_video),)
    takes_images = count_bounds(task.needs, "image")[1] > 0
    images = tuple(map(str, inputs.src_ref_images)) if takes_images else ()
    _check_counts(task, videos, images, where)
    if task.network:
        folder = Path(getattr(options, "annotators", ANNOTATORS_FOLDER))
        try:
            Networks(folder).open(task.network)
        except ConfigError as error:
            raise error.at(where) from None
    left = () if takes_images else inputs.src_ref_images
    text = format_json(options.model_dump(mode="json", exclude_defaults=True, exclude=set(task.fixed)))
    return TaskRequest(task.name, text, videos, images), Inputs(src_ref_images=left)


def prepare_task(request: TaskRequest, inputs: Inputs, folder: Path) -> tuple[Inputs, list[str]]:
    """Write the task's files to `folder`, and return them as inputs, with notes.

    Raises DataError and ConfigError.
    """
    task = TASKS.get(request.name)
    options = task.parse({**json.loads(request.options), **task.fixed}, f"task {task.name}")
    prepared = task.prepare(Sources.open(request.videos, request.images), options)
    made = write_files(prepared, folder, {}, lossless=True)
    notes = [f"task {task.name} made {describe(prepared)}", *prepared.notes]
    notes += [f"{name}: sha256 {digest}" for name, digest in prepared.networks.items()]
    paths = {key: folder / made[key] if made.get(key) else None for key in ("src_video", "src_mask")}
    references = tuple(folder / name for name in made["src_ref_images"]) or inputs.src_ref_images
    return replace(inputs, src_ref_images=references, **paths), notes


def _check_counts(task: Task, videos: Sequence[str], images: Sequence[str], where: str) -> None:
    for kind, key, given in (("clip", "video_path", videos), ("image", "image_paths", images)):
        fewest, limit = count_bounds(task.needs, kind)
        if len(given) < fewest or (len(given) > limit and kind == "clip"):
            raise ConfigError(
                f"task {task.name} got {len(given)} {kind}s",
                where=where,
                expected=f"at least {fewest}" if len(given) < fewest else f"at most {limit}",
                fix=f"set {key}" if len(given) < fewest else f"remove {key}",
            )
