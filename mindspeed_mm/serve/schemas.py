"""The responses of the API, and the schemas of its requests in the OpenAPI document.

Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.serve.fields import ALIASES, COMPUTED, FIELDS
from mindspeed_mm.serve.queue_file import Job, Status
from mindspeed_mm.serve.uploads import SLOTS


class ErrorDetails(BaseModel):
    """Why a request or a video failed."""

    code: str
    message: str = ""
    where: str | None = None
    problem: str | None = None
    expected: str | None = None
    fix: str | None = None


class Video(BaseModel):
    """A video in the queue."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(description="percent of the denoising steps")
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    size: str
    seconds: str
    queue_position: int | None = None
    eta_seconds: int | None = Field(default=None, description="estimated seconds until denoising ends")
    request: dict[str, Any] = Field(description="all fields of the request, as inference JSON keys")
    notes: list[str] = Field(
        default_factory=list,
        description="inputs that were adapted or are likely wrong; notes on frames follow with in_progress",
    )
    remixed_from_video_id: str | None = None
    error: ErrorDetails | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A deleted video. If it was not finished, it was cancelled."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def video_of(job: Job, *, model: str, now: float, position: int, keep_hours: float | None) -> Video:
    """Convert a job to the API's Video."""
    fields = job.request["fields"]
    sampling = {**SamplingConfig().model_dump(), **job.request.get("defaults", {}), **fields}
    ended = job.completed_at
    eta = None
    if job.status == "in_progress" and job.step and job.started_at is not None:
        eta = math.ceil((now - job.started_at) / job.step * (job.steps - job.step))
    return Video(
        id=job.id,
        model=model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        started_at=None if job.started_at is None else int(job.started_at),
        completed_at=None if ended is None else int(ended),
        expires_at=None if ended is None or keep_hours is None else int(ended + 3600 * keep_hours),
        prompt=fields["prompt"],
        size=f"{sampling['width']}x{sampling['height']}",
        seconds=f"{sampling['num_frames'] / sampling['fps']:g}",
        queue_position=position if job.status == "queued" else None,
        eta_seconds=eta,
        request={**fields, **job.request["files"]},
        notes=job.notes,
        remixed_from_video_id=job.request.get("source"),
        error=None if job.error is None else ErrorDetails(**job.error),
    )


def body_schema(*, edit: bool = False, overlap: bool = False) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that makes a video: fields with their bounds, and uploads."""

    described = RequestConfig.model_json_schema()["properties"]
    properties: dict[str, Any] = {name: described[name] for name in FIELDS}
    properties |= {
        alias: {**described[key], "description": f"another name for {key}"} for alias, key in ALIASES.items()
    }
    properties |= {name: {"description": text} for name, text in COMPUTED.items()}
    if edit:
        properties["video"] = {"description": "id of a finished video of this server; or upload src_video"}
    if overlap:
        described = "frames of its end that the new video begins with, 4k+1"
        properties["overlap_frames"] = {"type": "integer", "default": 9, "description": described}
    form = {**properties, **_uploads()}
    prompt = {"prompt": "a red ball bounces over a wooden floor"}
    examples: dict[str, dict[str, Any]] = {
        "short": {"value": {**prompt, "size": "832x480", "num_frames": 81, "seed": 7}},
        "long": {
            "value": {**prompt, "num_frames": 217, "window": 81, "window_prompts": ["it falls", "it rises"]}
        },
    }
    if overlap or edit:
        made = "video_0123456789abcdef01234567"
        examples = {name: {"value": {"video": made, **each["value"]}} for name, each in examples.items()}
    edits = {"task": {"summary": "with an upload as src_video", "value": {**prompt, "task": "gray"}}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _object(form), "examples": {**examples, **edits}},
                "application/json": {"schema": _object(properties), "examples": examples},
            },
        }
    }


def _uploads() -> dict[str, Any]:
    binary: Mapping[str, Any] = {"type": "string", "format": "binary"}
    found = {}
    for name, slot in SLOTS.items():
        one = {**binary, "description": slot.what}
        found[name] = {"type": "array", "items": binary, "description": slot.what} if slot.several else one
    return found


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": ["prompt"],
        "additionalProperties": False,
    }
