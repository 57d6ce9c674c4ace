"""Where a server keeps a job's files, and the inference JSON that a worker makes a video from. No torch."""

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
NAME = "video"  # of every result: the job's folder is what tells them apart
_ID = re.compile(r"video_[0-9a-f]{24}")
_FOLDERS = re.compile(r"(?<![\w.:/])/(?!v1/)(?:[^/\s:]+/)+")  # of an absolute path; /v1/ is the API's own
_DRAFT = ".draft"


class JobFolders:
    """`videos/ID/`: the uploads in `inputs/`, `request.json`, and what the generate command leaves behind."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir.absolute() / "videos"

    def of(self, job_id: str) -> Path:
        """The folder of a job. Raises ValueError for what is not an id of ours: it would be a path of a client's."""
        if not _ID.fullmatch(job_id):
            raise ValueError(job_id)
        return self.root / job_id

    def draft(self, job_id: str) -> Path:
        """A folder that `commit` makes the job's; until then it is swept when the server starts."""
        folder = self.root / f"{_DRAFT}_{job_id}"
        (folder / "inputs").mkdir(parents=True)
        return folder

    def commit(self, draft: Path, job_id: str) -> Path:
        """The draft as the job's folder."""
        folder = self.of(job_id)
        draft.rename(folder)
        return folder

    def inputs(self, job_id: str, files: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
        """The paths of a job's uploads, by slot."""
        folder = self.of(job_id) / "inputs"
        return {slot: [folder / name for name in names] for slot, names in files.items()}

    def result(self, job_id: str, suffix: str = ".mp4") -> Path:
        """A file of a finished video: .mp4, .png (sheet) or .json (settings)."""
        return self.of(job_id) / f"{NAME}{suffix}"

    def remove(self, job_id: str) -> None:
        """Delete everything of a job."""
        shutil.rmtree(self.of(job_id), ignore_errors=True)

    def sweep(self, known: set[str]) -> int:
        """Delete the folders of no known job: a server was killed between a draft and its row. Returns how many.

        A folder with a finished video stays: the queue itself was lost.
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
    """Files of another job as uploads of a new one: links where the file system has them, else copies."""
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
    """The generation job of a video, by the generate command's own rules; its inference JSON is `folder`/request.json.

    Raises ConfigError for what contradicts itself.
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
        raise in_api_words(error, folder) from None


def translator(folder: Path) -> Callable[[str], str]:
    """A text in the names that the client knows: slots in place of the inference JSON's keys and of our paths.

    Of the server's other files, such as its weights, the client sees the name without the folder.
    """
    slots = {path: path.stem.rpartition("_")[0] for path in (folder / "inputs").glob("*")}
    words = {f"{slot} {path}": slot for path, slot in slots.items()}  # once, not `src_video src_video`
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


def in_api_words(error: E, folder: Path) -> E:
    """The error in the words of the API.

    Advice about flags and folders is for the people who run the server, and is left out.
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
