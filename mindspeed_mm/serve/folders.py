"""The folders of a server's jobs, and the inference JSON that a worker generates a video from.

Does not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.files import write_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.serve.loras import Loras
from mindspeed_mm.serve.uploads import SLOTS
from mindspeed_mm.tasks.jobs.generate import GenerateJob

LOGGER = get_logger(__name__)
E = TypeVar("E", bound=MindSpeedMMError)
NAME = "video"  # file name of every result; each job has its own folder
_ID = re.compile(r"video_[0-9a-f]{24}")
# The folders of an absolute path, but not /v1/, which belongs to the API.
_FOLDERS = re.compile(r"(?<![\w.:/])/(?!v1/)(?:[^/\s:]+/)+")
_DRAFT = ".draft"


class JobFolders:
    """The folders `videos/ID/`: `inputs/` with the uploads, `request.json`, and the output files."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir.absolute() / "videos"

    def of(self, job_id: str) -> Path:
        """Return the folder of a job. Raises ValueError for a malformed id, which could contain a path."""
        if not _ID.fullmatch(job_id):
            raise ValueError(job_id)
        return self.root / job_id

    def draft(self, job_id: str) -> Path:
        """Make a draft of a job's folder. A draft that is never committed is deleted on the next start."""
        folder = self.root / f"{_DRAFT}_{job_id}"
        (folder / "inputs").mkdir(parents=True)
        return folder

    def commit(self, draft: Path, job_id: str) -> Path:
        """Rename a draft to the job's folder."""
        folder = self.of(job_id)
        draft.rename(folder)
        return folder

    def inputs(self, job_id: str, files: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
        """Return the paths of a job's uploads, by slot."""
        folder = self.of(job_id) / "inputs"
        return {slot: [folder / name for name in names] for slot, names in files.items()}

    def result(self, job_id: str, suffix: str = ".mp4") -> Path:
        """Return the path of an output: .mp4, .png (contact sheet) or .json (settings)."""
        return self.of(job_id) / f"{NAME}{suffix}"

    def remove(self, job_id: str) -> None:
        """Delete the folder of a job."""
        shutil.rmtree(self.of(job_id), ignore_errors=True)

    def sweep(self, known: set[str]) -> int:
        """Delete the folders of unknown jobs, and return their number.

        Such a folder remains if the server is killed before the job is queued. A folder with a finished video
        is kept, because the queue itself may have been lost.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        removed, orphans = 0, 0
        for entry in os.scandir(self.root):
            if entry.name in known or not (entry.name.startswith(_DRAFT) or _ID.fullmatch(entry.name)):
                continue
            if (Path(entry.path) / f"{NAME}.mp4").exists():
                orphans += 1
                continue
            shutil.rmtree(entry.path, ignore_errors=True)
            removed += 1
        if orphans:
            LOGGER.warning("%s: %d finished videos are not in the queue; they are kept", self.root, orphans)
        return removed


def link_inputs(sources: Mapping[str, Sequence[Path]], folder: Path) -> dict[str, list[str]]:
    """Reuse files of another job as uploads of a new one: hard-link them, or copy them if that fails."""
    names: dict[str, list[str]] = {}
    for slot, paths in sources.items():
        for index, path in enumerate(paths):
            place = folder / f"{slot}_{index}{path.suffix}"
            try:
                os.link(path, place)
            except OSError:
                shutil.copyfile(path, place)
            names.setdefault(slot, []).append(place.name)
    return names


def build_job(
    folder: Path,
    base: Mapping[str, Any],
    fields: Mapping[str, Any],
    files: Mapping[str, Sequence[str]],
    loras: Loras,
) -> GenerateJob:
    """Build the generation job of a video, with the same checks as the generate command.

    Writes the inference JSON to `folder`/request.json. Raises ConfigError for an invalid request.
    """
    values: dict[str, Any] = {**base, **fields, "name": NAME, "output_path": str(folder)}
    if "loras" in fields:
        values["loras"] = loras.found(fields["loras"])
    for slot, names in files.items():
        key = SLOTS[slot].key
        paths = [str(folder / "inputs" / name) for name in names]
        values[key] = paths if SLOTS[slot].several else paths[0]
    path = folder / "request.json"
    write_json(path, values)
    try:
        return GenerateJob.from_file(path)
    except MindSpeedMMError as error:
        raise translate_error(error, folder) from None


def translator(folder: Path) -> Callable[[str], str]:
    """Return a function that rewrites text for the client.

    The function replaces inference JSON keys and paths of uploads with slot names, and removes the folders
    from the paths of other files, such as the weights.
    """
    slots = {path: path.stem.rpartition("_")[0] for path in (folder / "inputs").glob("*")}
    words = {f"{slot} {path}": slot for path, slot in slots.items()}  # avoids `src_video src_video`
    words |= {f"{path}": slot for path, slot in slots.items()}
    words |= {slot.key: name for name, slot in SLOTS.items() if slot.key}
    words |= {
        "image_path": "src_ref_images",
        "request.json:": "",
        f"{folder}/": "",
        f"{folder}": "",
    }

    def translate(text: str) -> str:
        for ours, theirs in words.items():
            text = text.replace(ours, theirs)
        return _FOLDERS.sub("", text).removeprefix(f"{NAME}: ")

    return translate


def translate_error(error: E, folder: Path) -> E:
    """Rewrite an error in terms of the API.

    Advice about flags and folders is left out, because it concerns the operator of the server.
    """
    translate = translator(folder)
    advice = "; ".join(
        part for part in error.fix.split("; ") if "--" not in part and "output_path" not in part
    )
    fields = (error.where, error.expected, advice)
    where, expected, fix = (translate(text) for text in fields)
    return type(error)(translate(error.problem), where=where.strip(": "), expected=expected, fix=fix)


def discard(folder: Path) -> None:
    """Delete a draft."""
    with suppress(OSError):
        shutil.rmtree(folder)
