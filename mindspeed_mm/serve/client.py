"""`vace generate --server URL`: generates the videos of an inference JSON on a server.

Does not import torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from mindspeed_mm.errors import ConfigError, DataError, LaunchError, MindSpeedMMError
from mindspeed_mm.files import atomic_path, write_json
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.processes import Stopped, check_stop
from mindspeed_mm.progress import Progress
from mindspeed_mm.serve.fields import FIELDS
from mindspeed_mm.serve.main import TOKEN
from mindspeed_mm.serve.uploads import SLOTS
from mindspeed_mm.tasks.jobs.generate import GenerateJob

LOGGER = get_logger(__name__)
_TIMEOUT = (10, 300)  # seconds to connect, and to wait for the next byte
_POLL = 0.5
_RETURN = 300.0  # seconds to wait for a server that became unreachable
_PATIENCE = 3600.0  # seconds to wait while the queue is full or the model is loading


class Client:
    """A client for a server's queue of videos."""

    def __init__(self, server: str, token: str | None = None, patience: float = _PATIENCE) -> None:
        """`token`: the server's token; defaults to VACE_TOKEN.

        `patience`: seconds to wait while the queue is full or the model is loading. Raises ConfigError if
        `server` is not a URL.
        """
        if urlsplit(server).scheme not in ("http", "https") or not urlsplit(server).netloc:
            raise ConfigError(f"got {server!r:.100}", where="--server", expected="http://host:port")
        self.base = server.rstrip("/")
        self.session = requests.Session()
        self.patience = patience
        if token := token or os.environ.get(TOKEN, "").strip():
            self.session.headers["authorization"] = f"Bearer {token}"

    def create(self, fields: Mapping[str, str], files: Mapping[str, list[Path]]) -> dict[str, Any]:
        """Queue a video, and return its state. Waits while the model is loading or the queue is full.

        Raises ConfigError and LaunchError.
        """
        until = time.monotonic() + self.patience
        while True:
            with ExitStack() as stack:
                # requests sends a multipart form only if `files` is set, so text fields are passed as files.
                parts: list[tuple[str, Any]] = [(name, (None, text)) for name, text in fields.items()]
                parts += [
                    (slot, (path.name, stack.enter_context(path.open("rb"))))
                    for slot, paths in files.items()
                    for path in paths
                ]
                response = self._send("POST", "/v1/videos", files=parts)
            if response.status_code not in (429, 503) or time.monotonic() > until:
                video: dict[str, Any] = self._checked(response).json()
                return video
            LOGGER.info("%s; trying again", _error_of(response).get("message", response.reason))
            _sleep(min(float(response.headers.get("retry-after", 10)), 30))

    def get(self, video_id: str) -> dict[str, Any]:
        """Return the state of a video. Raises LaunchError if the server is unreachable for 5 minutes."""
        until = time.monotonic() + _RETURN
        while True:
            try:
                response = self._send("GET", f"/v1/videos/{video_id}")
                if response.status_code < 500:
                    state: dict[str, Any] = self._checked(response).json()
                    return state
                problem = LaunchError(f"responds with {response.status_code}", where=self.base)
            except LaunchError as error:
                problem = error
            if time.monotonic() > until:
                raise problem
            _sleep(2)

    def delete(self, video_id: str) -> None:
        """Cancel and delete a video. An unknown video is not an error. Raises ConfigError and LaunchError."""
        response = self._send("DELETE", f"/v1/videos/{video_id}")
        if response.status_code != 404:
            self._checked(response)

    def list(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the newest videos."""
        found: list[dict[str, Any]] = self._checked(self._send("GET", f"/v1/videos?limit={limit}")).json()[
            "data"
        ]
        return found

    def model(self) -> dict[str, Any]:
        """Return the served model: its name, the defaults of requests, and its number of experts."""
        found: dict[str, Any] = self._checked(self._send("GET", "/v1/models")).json()["data"][0]
        return found

    def download(self, video_id: str, path: Path, variant: str = "video") -> None:
        """Download the mp4 or another variant, and write it atomically."""
        response = self._checked(
            self._send("GET", f"/v1/videos/{video_id}/content?variant={variant}", stream=True)
        )
        with response, atomic_path(path) as draft, draft.open("wb") as written:
            for block in response.iter_content(1 << 20):
                written.write(block)

    def _send(self, method: str, path: str, *, files: Any = None, stream: bool = False) -> requests.Response:
        try:
            return self.session.request(
                method, self.base + path, files=files, stream=stream, timeout=_TIMEOUT, allow_redirects=False
            )
        except requests.RequestException as error:
            reason = getattr(
                getattr(error.args[0] if error.args else error, "reason", None), "strerror", None
            )
            raise LaunchError(
                f"cannot be reached: {reason or type(error).__name__}",
                where=self.base,
                fix="start it with vace serve",
            ) from None

    def _checked(self, response: requests.Response) -> requests.Response:
        if response.status_code < 300:
            return response
        details = _error_of(response)
        raise ConfigError(
            details.get("problem")
            or details.get("message")
            or f"responds with {response.status_code} {response.reason}",
            where=": ".join(filter(None, [self.base, details.get("where")])),
            expected=details.get("expected", ""),
            fix=f"set {TOKEN}" if response.status_code == 401 else details.get("fix", ""),
        )


@one_line_errors
def main(argv: Sequence[str], server: str, prog: str) -> None:
    """Run the command with --server. The weights named in the JSON need not exist on this machine."""
    job = GenerateJob.from_argv(argv, prog, needs_weights=False)
    if job.print_config:
        LOGGER.info(job.to_json())
        return
    for note in job.notes:
        LOGGER.info(note)
    job.check_outputs()
    if not job.dry_run:
        run(job, server)


def run(job: GenerateJob, server: str) -> None:
    """Queue every video of the job, wait, download NAME.mp4, and write NAME.json.

    A signal or an error cancels the videos that are not finished.
    """
    client = Client(server)
    folder = Path(job.run.output_path)
    with lock_folder(folder, choose="output_path"), cancelling(client) as waiting:
        planned = [(video, fields_of(video, len(job.model.experts)), files_of(video)) for video in job.videos]
        for video, fields, files in planned:
            waiting[client.create(fields, files)["id"]] = video
        for video_id, video in list(waiting.items()):
            state = wait_for(client, video_id, video.name)
            del waiting[video_id]
            if state["status"] == "failed":
                raise DataError(state["error"].get("message", "failed"), where=f"{client.base}: {video.name}")
            for note in state.get("notes") or ():
                LOGGER.info("  %s: %s", video.name, note)
            path = folder / f"{video.name}.mp4"
            client.download(video_id, path)
            write_json(path.with_suffix(".json"), {**video.to_json(), "server": client.base, "video": state})
            LOGGER.info("  %s", path)


@contextmanager
def cancelling(client: Client) -> Iterator[dict[str, GenerationRequest]]:
    """Yield a dict of queued videos by id. On an error or signal, cancel the videos that are still in it."""
    waiting: dict[str, GenerationRequest] = {}
    try:
        yield waiting
    except (Stopped, DataError, ConfigError):
        for video_id in waiting:
            with suppress(MindSpeedMMError):  # keep the original error
                client.delete(video_id)
        raise


def wait_for(client: Client, video_id: str, name: str) -> dict[str, Any]:
    """Wait until a video is completed or failed, and return its state."""
    done = 0
    with Progress(name, 100, "%") as progress:
        while True:
            state = client.get(video_id)
            progress.step(state["progress"] - done)
            done = state["progress"]
            if state["status"] in ("completed", "failed"):
                return state
            _sleep(_POLL)


def fields_of(video: GenerationRequest, experts: int) -> dict[str, str]:
    """Return the form fields of a request. Every number is sent, so that the server's defaults do not apply.

    LoRAs are sent as file names, which must exist in the server's `--loras-dir`. Raises ConfigError.
    """
    if video.task is not None:
        raise ConfigError(
            "cannot be sent to a server",
            where=f"{video.name}: task",
            fix="create its inputs with vace prepare first",
        )
    loras = [{**lora.model_dump(mode="json"), "path": Path(lora.path).name} for lora in video.loras]
    values = {
        **video.sampling.model_dump(mode="json"),
        "prompt": video.prompt,
        "negative_prompt": video.negative_prompt,
        "outpaint": video.inputs.outpaint,
        "window_prompts": list(video.window_prompts) or None,
        "loras": loras or None,
    }
    left_out = {"guidance_scale_2"} if experts == 1 else set()
    if video.sampling.solver != "euler":
        left_out.add("videoxfun_sigmas")
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if name in FIELDS and name not in left_out and value is not None
    }


def files_of(video: GenerationRequest) -> dict[str, list[Path]]:
    """Return the files that a request uploads, by slot. Raises DataError for a folder of images."""
    given = {name: getattr(video.inputs, name) for name in SLOTS if hasattr(video.inputs, name)}
    found: dict[str, list[Path]] = {}
    for slot, value in given.items():
        for path in map(
            Path, value if isinstance(value, (list, tuple)) else [value] if value is not None else []
        ):
            if path.is_dir():
                raise DataError(
                    "is a folder, which cannot be sent", where=path, fix="convert its images to a clip"
                )
            found.setdefault(slot, []).append(path)
    return found


def _error_of(response: requests.Response) -> dict[str, str]:
    try:
        error = response.json()["error"]
        return {name: str(text) for name, text in error.items() if text}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _sleep(seconds: float) -> None:
    time.sleep(seconds)
    check_stop()
