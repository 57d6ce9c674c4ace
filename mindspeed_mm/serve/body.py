"""Reads the body of a request: fields, files, and the source of an edit. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from mindspeed_mm.files import parse_json
from mindspeed_mm.geometry import WAN
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.problem import ApiError
from mindspeed_mm.serve.uploads import SLOTS

_FIELDS = 200  # maximum number of fields in a form
_FIELD_BYTES = 1 << 20
Uploads = Mapping[str, Sequence[BinaryIO]]  # slot → open files


@dataclass(frozen=True)
class Given:
    """The fields of a request. If `form` is set, the body was a form, so all values are strings."""

    values: Mapping[str, Any]
    form: bool


@asynccontextmanager
async def read_body(request: Request, settings: ServeConfig) -> AsyncIterator[tuple[Given, Uploads]]:
    """Yield the fields of a JSON or form body and its files by slot. The files stay open inside the block.

    Raises ApiError.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        body = await read_short(request)
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ApiJson(f"byte {error.start} is not UTF-8", where="the body", fix="send UTF-8") from None
        given = await run_in_threadpool(parse_json, text, "the body", ApiJson)
        if not isinstance(given, dict):
            raise ApiError(
                400, "invalid_request", "got no object", where="the body", expected="a JSON object"
            )
        yield Given(given, form=False), {}
        return
    if media_type not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise ApiError(
            415,
            "unsupported_format",
            f"got {media_type!r:.80}",
            where="Content-Type",
            expected="application/json or multipart/form-data",
        )
    async with AsyncExitStack() as stack:
        form = await stack.enter_async_context(
            request.form(max_files=settings.max_files + 1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)
        )
        values: dict[str, str] = {}
        uploads: dict[str, list[BinaryIO]] = {}
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            # Some clients send the source of an edit or extension under this name.
            if isinstance(value, UploadFile) and name == "video":
                name = "src_video"
            if isinstance(value, UploadFile):
                if name not in SLOTS:
                    raise ApiError(
                        400,
                        "invalid_request",
                        "is not a name for a file",
                        where=f"{name:.60}",
                        expected=" or ".join(SLOTS),
                    )
                uploads.setdefault(name, []).append(value.file)
            elif name in values:
                raise ApiError(400, "invalid_request", "is given twice", where=f"{name:.60}")
            elif name in SLOTS:
                raise ApiError(
                    400,
                    "invalid_request",
                    "got a string",
                    where=name,
                    expected="an upload",
                    fix="send the file itself",
                )
            else:
                values[name] = value
        yield Given(values, form=True), uploads


async def read_short(request: Request) -> bytes:
    """Read a body without files. Raises ApiError if it is too long."""
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > _FIELD_BYTES:
            raise ApiError(
                413, "too_large", "the JSON is too large", expected=f"at most {_FIELD_BYTES >> 20} MiB"
            )
    return bytes(body)


class ApiJson(ApiError):
    """The error for a body that is not valid JSON."""

    def __init__(self, problem: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(400, "invalid_json", problem, where=where, expected=expected, fix=fix)


def take_source(given: Mapping[str, Any], uploads: Uploads) -> tuple[dict[str, Any], str | None]:
    """Return the fields without `video`, and the id in `video`, which is None if src_video is uploaded.

    Raises ApiError unless exactly one of `video` and src_video is given.
    """
    values = dict(given)
    source = _video_id(values.pop("video", None))
    if (source is None) == ("src_video" not in uploads):
        raise ApiError(
            400,
            "invalid_request",
            "is missing" if source is None else "is given beside src_video",
            where="video",
            fix="send the id of a finished video, or upload src_video",
        )
    return values, source


def read_overlap(value: Any) -> int:
    """Parse the number of frames that an extension repeats. Raises ApiError."""
    text = str(value)
    if not (text.isascii() and text.isdigit()) or not WAN.fits_frames(int(text[:9])):
        raise ApiError(
            400,
            "invalid_request",
            f"got {text!r:.80}",
            where="overlap_frames",
            expected="4k+1 frames: 1, 5, 9 …",
        )
    return int(text[:9])


def _video_id(video: Any) -> str | None:
    """Return the id in `video`, which is an id or, from clients of the original API, {"id": …}."""
    if isinstance(video, str) and video.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            video = json.loads(video)
    if isinstance(video, dict):
        video = video.get("id")
    if video is not None and not isinstance(video, str):
        raise ApiError(400, "invalid_request", "is not an id", where="video", expected="the id of a video")
    return video
