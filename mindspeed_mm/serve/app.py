"""The HTTP API. Its routes read and write the queue and the job folders.

Does not import torch, because the models are in the workers.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.log import get_logger
from mindspeed_mm.serve.body import Given, Uploads, read_body, read_overlap, take_source
from mindspeed_mm.serve.config import ServeConfig
from mindspeed_mm.serve.engine import Engine
from mindspeed_mm.serve.fields import FIELDS, read_fields
from mindspeed_mm.serve.folders import (
    JobFolders,
    build_job,
    discard,
    link_inputs,
    translate_error,
    translator,
)
from mindspeed_mm.serve.guard import Guard
from mindspeed_mm.serve.jobs import JobStore, make_id
from mindspeed_mm.serve.loras import Loras
from mindspeed_mm.serve.metrics import exposition
from mindspeed_mm.serve.problem import ApiError, describe_error, error_body
from mindspeed_mm.serve.queue_file import Job
from mindspeed_mm.serve.results import keep_tail, spritesheet, thumbnail
from mindspeed_mm.serve.schemas import Deleted, Video, VideoList, body_schema, video_of
from mindspeed_mm.serve.uploads import keep_uploads, remarks_of

LOGGER = get_logger(__name__)
Prepare = Callable[[Path], dict[str, list[str]]]  # fills a job's `inputs` folder; returns slot → file names
_OVERLAP = 9  # default number of frames at the end of a video with which an extension begins
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in {
        400: "a field or file is invalid",
        401: "wrong token",
        404: "no such video",
        409: "the video is not finished",
        413: "too large",
        415: "not an image or a video",
        429: "the queue is full",
        503: "the models are not loaded yet",
    }.items()
}


@dataclass(frozen=True)
class Service:
    """The state shared by the routes."""

    settings: ServeConfig
    store: JobStore
    folders: JobFolders
    engine: Engine
    model: str  # the model's name in requests
    base: Mapping[str, Any]  # keys common to the inference JSONs of all jobs

    def read(self, given: Mapping[str, Any], *, form: bool) -> dict[str, Any]:
        """Check the fields of a request, and return them as keys of the inference JSON."""
        return read_fields(given, self.model, form=form, fps=self.base.get("fps"), loras=self.loras)

    @property
    def loras(self) -> Loras:
        """The LoRAs that a request may name."""
        return Loras(self.settings.loras_dir)

    def show(self, job: Job) -> Video:
        """Return the job as clients see it."""
        return video_of(
            job,
            model=self.model,
            now=time.time(),
            position=self.store.position(job),
            keep_hours=self.settings.keep_hours,
        )

    def find(self, video_id: str) -> Job:
        """Return the job. Raises ApiError if it is unknown."""
        job = self.store.get(video_id)
        if job is None:
            raise ApiError(404, "not_found", "no such video", where="id")
        return job

    def finished(self, video_id: str) -> Path:
        """Return the mp4 file of a job. Raises ApiError if the job is not completed."""
        job = self.find(video_id)
        if job.status != "completed":
            why = f": {job.error['message']}" if job.error and "message" in job.error else ""
            raise ApiError(409, f"video_{job.status}", f"the video is {job.status}{why}", where="id")
        path = self.folders.result(video_id)
        if not path.is_file():
            raise ApiError(404, "not_found", "the video's file is gone", where="id")
        return path

    def source(self, video_id: str) -> Path:
        """Return the clip that was uploaded as a job's src_video. Raises ApiError if there is none."""
        files = self.folders.inputs(video_id, self.find(video_id).request["files"])
        path = next(iter(files.get("src_video", ())), None)
        if path is None or not path.is_file():
            raise ApiError(404, "not_found", "the video has no src_video", where="id")
        return path

    def check_ready(self) -> None:
        """Raise ApiError if the models have not been loaded, or if the queue is damaged."""
        if self.engine.damage:
            raise ApiError(503, "queue_damaged", self.engine.damage, retry_after=60)
        state, message = self.engine.state()
        if state != "ready" and not self.engine.was_ready:
            code = "model_failed" if state == "failed" else "model_loading"
            raise ApiError(503, code, message, retry_after=10)

    def create(self, fields: Mapping[str, Any], prepare: Prepare, *, source: str | None = None) -> Video:
        """Check a request and its files, and queue it. A rejected request leaves no files behind."""
        job_id = make_id()
        draft = self.folders.draft(job_id)
        try:
            files = prepare(draft / "inputs")
            planned = build_job(draft, self.base, fields, files, self.loras)
            video = planned.videos[0]
            self._check_size(video.sampling.model_dump())
            translated = map(translator(draft), planned.notes)
            soft = video.sampling.soft_mask if video.task is None else None
            notes = [*translated, *remarks_of(draft / "inputs", files, soft_mask=soft)]
            folder = self.folders.commit(draft, job_id)
        except MindSpeedMMError as error:
            discard(draft)
            raise (error if isinstance(error, ApiError) else translate_error(error, draft)) from None
        except BaseException:
            discard(draft)
            raise
        defaults = {
            key: value for key, value in self.base.items() if key in ("width", "height", "num_frames", "fps")
        }
        request = {
            "fields": dict(fields),
            "files": files,
            "defaults": defaults,
            "source": source,
            "notes": notes,
        }
        job = self.store.add(request, limit=self.settings.max_queue, new_id=job_id)
        if job is None:
            discard(folder)
            raise ApiError(
                429,
                "queue_full",
                f"{self.settings.max_queue} videos are waiting",
                fix="try again later",
                retry_after=30,
            )
        return self.show(job)

    def _check_size(self, sampling: Mapping[str, Any]) -> None:
        pixels = sampling["num_frames"] * sampling["width"] * sampling["height"]
        if pixels > self.settings.max_video_pixels:
            raise ApiError(
                400,
                "too_many_pixels",
                f"{sampling['num_frames']} frames of {sampling['width']}x{sampling['height']} have "
                f"{pixels} pixels",
                where="size",
                expected=f"at most {self.settings.max_video_pixels}",
                fix="request fewer frames or a smaller size",
            )


def build_app(service: Service, token: str | None) -> Guard:
    """Build the application, wrapped in its guard."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.stop)

    app = FastAPI(
        title="VACE videos",
        summary="Generate and edit videos: the /v1/videos API with src_video, src_mask and references.",
        version="1",
        lifespan=lifespan,
        redoc_url=None,
    )
    _add_errors(app)
    _add_videos(app, service)
    _add_probes(app, service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return Guard(app, service.settings, token)


def _add_errors(app: FastAPI) -> None:
    def respond(status: int, details: Mapping[str, str], retry_after: int | None = None) -> Response:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return JSONResponse(error_body(status, details), status_code=status, headers=headers)

    @app.exception_handler(MindSpeedMMError)
    async def ours(_: Request, error: MindSpeedMMError) -> Response:
        if isinstance(error, ApiError):
            return respond(error.status, describe_error(error), error.retry_after)
        return respond(400, describe_error(error))

    @app.exception_handler(HTTPException)
    async def starlettes(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return respond(error.status_code, {"code": code, "message": str(error.detail)})

    @app.exception_handler(sqlite3.Error)
    async def databases(_: Request, error: sqlite3.Error) -> Response:
        LOGGER.error("the queue: %s", error)
        message = f"the queue cannot be used: {error}"
        return respond(503, {"code": "queue_failed", "message": message}, 10)

    @app.exception_handler(Exception)
    async def others(_: Request, error: Exception) -> Response:
        return respond(
            500, {"code": "internal_error", "message": f"{type(error).__name__}; see the server's log"}
        )

    @app.exception_handler(RequestValidationError)
    async def fastapis(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where, problem = str(first["loc"][-1]), first["msg"]
        return respond(
            400,
            {"code": "invalid_request", "message": f"{where}: {problem}", "where": where, "problem": problem},
        )


def _add_videos(app: FastAPI, service: Service) -> None:
    make: dict[str, Any] = {"response_model": Video, "responses": _ERRORS}

    @app.post("/v1/videos", openapi_extra=body_schema(), summary="Queue a video", **make)
    async def create(request: Request) -> Video:
        service.check_ready()
        async with read_body(request, service.settings) as (given, uploads):
            return await run_in_threadpool(new_video, given, uploads)

    def new_video(given: Given, uploads: Uploads) -> Video:
        fields = service.read(given.values, form=given.form)
        return service.create(fields, lambda folder: keep_uploads(uploads, folder, service.settings))

    @app.post(
        "/v1/videos/edits",
        openapi_extra=body_schema(edit=True),
        summary="Edit a finished video, or an upload",
        **make,
    )
    async def edit(request: Request) -> Video:
        service.check_ready()
        async with read_body(request, service.settings) as (given, uploads):
            return await run_in_threadpool(edited, given, uploads)

    @app.post(
        "/v1/videos/extensions",
        openapi_extra=body_schema(edit=True, overlap=True),
        summary="Extend a video beyond its end",
        **make,
    )
    async def extend(request: Request) -> Video:
        service.check_ready()
        async with read_body(request, service.settings) as (given, uploads):
            return await run_in_threadpool(extended, given, uploads)

    def edited(given: Given, uploads: Uploads) -> Video:
        values, source = take_source(given.values, uploads)
        fields = service.read(values, form=given.form)
        finished = None if source is None else service.finished(source)

        def prepare(folder: Path) -> dict[str, list[str]]:
            files = keep_uploads(uploads, folder, service.settings)
            if finished is None:
                return files
            if "src_video" in files:
                raise ApiError(
                    400, "invalid_request", "is given beside video", where="src_video", fix="send one of them"
                )
            return {**files, **link_inputs({"src_video": [finished]}, folder)}

        return service.create(fields, prepare, source=source)

    def extended(given: Given, uploads: Uploads) -> Video:
        values, source = take_source(given.values, uploads)
        overlap = read_overlap(values.pop("overlap_frames", _OVERLAP))
        fields = service.read(values, form=given.form)
        frames = fields.get("num_frames", service.base.get("num_frames", SamplingConfig().num_frames))
        if overlap >= frames:
            raise ApiError(
                400,
                "invalid_request",
                f"got {overlap}",
                where="overlap_frames",
                expected=f"fewer than num_frames, {frames}",
            )
        finished = None if source is None else service.finished(source)

        def prepare(folder: Path) -> dict[str, list[str]]:
            files = keep_uploads(uploads, folder, service.settings)
            if "first_frame" in files:
                raise ApiError(
                    400,
                    "invalid_request",
                    "is taken from the end of the video",
                    where="first_frame",
                    fix="remove it",
                )
            clip = finished or folder / files.pop("src_video")[0]
            return {**files, "first_frame": [keep_tail(clip, overlap, folder).name]}

        return service.create(fields, prepare, source=source)

    @app.post("/v1/videos/{video_id}/remix", summary="Generate again with another prompt", **make)
    async def remix(video_id: str, request: Request) -> Video:
        service.check_ready()
        async with read_body(request, service.settings) as (given, uploads):
            if uploads:
                raise ApiError(400, "invalid_request", "remix takes no files", where=next(iter(uploads)))
            return await run_in_threadpool(remixed, video_id, given)

    def remixed(video_id: str, given: Given) -> Video:
        job = service.find(video_id)
        fields = {**job.request["fields"], **service.read(given.values, form=given.form)}
        sources = service.folders.inputs(video_id, job.request["files"])
        return service.create(fields, lambda folder: link_inputs(sources, folder), source=video_id)

    @app.get("/v1/videos", response_model=VideoList, summary="List the videos, newest first")
    def page(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        try:
            jobs, has_more = service.store.page(after=after, limit=limit, newest_first=order == "desc")
        except KeyError:
            raise ApiError(404, "not_found", "no such video", where="after") from None
        data = [service.show(job) for job in jobs]
        return VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )

    @app.get(
        "/v1/videos/{video_id}", response_model=Video, responses=_ERRORS, summary="Get the state and progress"
    )
    def get(video_id: str) -> Video:
        return service.show(service.find(video_id))

    @app.delete(
        "/v1/videos/{video_id}", response_model=Deleted, responses=_ERRORS, summary="Cancel and delete"
    )
    def delete(video_id: str) -> Deleted:
        if service.store.cancel(video_id) is None:
            service.find(video_id)  # raises
        service.engine.clean()
        return Deleted(id=video_id)

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=FileResponse,
        responses=_ERRORS,
        summary="Download the video or images of it",
    )
    def content(
        video_id: str, variant: Literal["video", "thumbnail", "spritesheet", "sheet", "source"] = "video"
    ) -> FileResponse:
        if variant == "source":
            source = service.source(video_id)
            return FileResponse(source, filename=f"{video_id}_source{source.suffix}")
        path = service.finished(video_id)
        if variant == "video":
            return FileResponse(path, media_type="video/mp4", filename=f"{video_id}.mp4")
        if variant == "thumbnail":
            return FileResponse(thumbnail(path), media_type="image/webp")
        if variant == "sheet":
            sheet = service.folders.result(video_id, ".png")
            if not sheet.is_file():
                raise ApiError(404, "not_found", "the video's sheet is gone", where="id")
            return FileResponse(sheet, media_type="image/png")
        return FileResponse(spritesheet(path), media_type="image/jpeg")

    @app.get("/v1/models", summary="List the served model")
    def models() -> dict[str, Any]:
        shown = {"id": service.model, "object": "model", "owned_by": "local"}
        defaults = {name: value for name, value in service.base.items() if name in FIELDS and name != "loras"}
        experts = len(service.base["model"]["transformer"])
        more = {"defaults": defaults, "experts": experts, "loras": service.loras.names()}
        return {"object": "list", "data": [{**shown, **more}]}


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Check that the server responds")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Check that the models are loaded")
    def ready() -> JSONResponse:
        state, _ = service.engine.state()
        headers = {} if state == "ready" else {"Retry-After": "10"}
        return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503, headers=headers)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Get Prometheus metrics")
    def metrics() -> Response:
        body, media_type = exposition(service.store, service.engine)
        return Response(body, media_type=media_type)
