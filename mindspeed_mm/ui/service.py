"""The state shared by all pages: the server, local copies of its files, and saved settings.

Does not import gradio.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.serve.client import Client
from mindspeed_mm.ui.presets import Presets
from mindspeed_mm.ui.request import Request
from mindspeed_mm.ui.videos import Files

_LISTED = 50  # maximum number of videos in the history


class Service:
    """The server and the folder that all pages share."""

    def __init__(self, client: Client, folder: Path, root: Path, *, sample: Path | None = None) -> None:
        """`root`: the folder that the page may read. `sample`: a sample clip for the model."""
        self.client, self.folder, self.root, self.sample = client, folder, root, sample
        self.work = folder / "page"
        self.work.mkdir(parents=True, exist_ok=True)
        self.files = Files(client, self.work)
        self.presets = Presets(folder / "presets")
        self._model: dict[str, Any] | None = None
        self._listed: tuple[float, list[dict[str, Any]]] = (0.0, [])

    def model(self) -> dict[str, Any]:
        """Return the served model and the defaults of requests. Raises LaunchError and ConfigError."""
        if self._model is None:
            self._model = self.client.model()
        return self._model

    def defaults(self) -> dict[str, Any]:
        """Return the defaults of requests, or {} while the server does not respond."""
        try:
            return dict(self.model().get("defaults") or {})
        except MindSpeedMMError:
            return {}

    def videos(self) -> list[dict[str, Any]]:
        """Return the newest videos. The response is cached for half a second.

        Raises LaunchError and ConfigError.
        """
        when, known = self._listed
        if time.monotonic() - when > 0.5:
            known = self.client.list(_LISTED)
            self._listed = (time.monotonic(), known)
        return known

    def send(self, request: Request) -> str:
        """Queue a video and return its id. Raises ConfigError and LaunchError."""
        made = self.client.create(request.texts(), request.files)
        self._listed = (0.0, [])
        return str(made["id"])

    def delete(self, video_id: str) -> None:
        """Cancel or delete a video."""
        self.client.delete(video_id)
        self.files.forget(video_id)
        self._listed = (0.0, [])

    def scratch(self) -> Path:
        """Return the folder for requests that are checked but not sent."""
        return Path(tempfile.gettempdir())
