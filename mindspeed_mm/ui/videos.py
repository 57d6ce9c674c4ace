"""Shows the server's videos on the page: rows of the queue, thumbnails, and files for the players.

Does not import torch or gradio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.serve.client import Client
from mindspeed_mm.ui.text import Words

SHOWN = 5  # maximum number of rows shown of the queue
Video = Mapping[str, Any]  # an entry of /v1/videos
_SHORT = 60


def waiting(videos: Sequence[Video]) -> list[Video]:
    """Return the videos in the queue, in the order in which they are made."""
    found = [video for video in videos if video["status"] in ("queued", "in_progress")]
    return sorted(
        found, key=lambda video: (video["status"] != "in_progress", video.get("queue_position") or 0)
    )


def finished(videos: Sequence[Video]) -> list[Video]:
    """Return the completed videos, in the given order."""
    return [video for video in videos if video["status"] == "completed"]


def row(video: Video, words: Words) -> str:
    """Return the HTML of a row of the queue."""
    percent = int(video["progress"])
    if video["status"] == "queued":
        state = words("status_queued", {"count": int(video.get("queue_position") or 0)})
    elif video["status"] == "failed":
        state = words("status_failed", {"why": (video.get("error") or {}).get("message", "")})
    else:
        state = words("status_in_progress", {"percent": percent})
        if video.get("eta_seconds") is not None:
            state += " · " + words("eta", {"seconds": int(video["eta_seconds"])})
    size = f"{video['size']}, {video['seconds']} s"
    return (
        f'<div class="job {escape(str(video["status"]))}">'
        f'<div class="job-text">{escape(short(video["prompt"]))}</div>'
        f'<div class="job-bar"><div style="width:{percent}%"></div></div>'
        f'<div class="job-state">{escape(state)} · {escape(size)}</div>{remarks(video)}</div>'
    )


def remarks(video: Video) -> str:
    """Return the HTML of the server's notes on a request, or "" if there are none."""
    lines = "".join(f"<li>{escape(str(note))}</li>" for note in video.get("notes") or ())
    return f'<ul class="job-notes">{lines}</ul>' if lines else ""


def short(text: str) -> str:
    """Shorten a prompt to one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else line[: _SHORT - 1] + "…"


def notice(text: str, *, bad: bool = False) -> str:
    """Return the HTML of a notice, or "" for an empty text."""
    return f'<div class="notice{" bad" if bad else ""}" role="status">{escape(text)}</div>' if text else ""


class Files:
    """Local copies of the server's files, because browsers connect only to the page."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder

    def get(self, video_id: str, variant: str, suffix: str) -> Path | None:
        """Return the file, downloaded if it is missing, or None if the download fails.

        The server makes the ids, so an id is safe in a file name.
        """

        path = self.folder / f"{video_id}_{variant}{suffix}"
        if not path.exists():
            try:
                self.client.download(video_id, path, variant)
            except MindSpeedMMError:
                return None
        return path

    def forget(self, video_id: str) -> None:
        """Delete the copies of one video."""
        for path in self.folder.glob(f"{video_id}_*"):
            with suppress(OSError):
                path.unlink()
