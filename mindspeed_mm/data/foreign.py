"""Reads datasets in the layouts of other projects as rows with the keys of a data.json.

Does not import torch.

DiffSynth-Studio   video, prompt, vace_video, vace_video_mask, vace_reference_image      metadata.csv or .json
VideoX-Fun         file_path, text, control_file_path, object_file_path, type            .json or .csv
a folder           name.mp4 next to name.txt, in folders of any depth
four folders       orig/name.mp4, cropped/name.mp4, mask/name.png, prompt/name.txt
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.data.images import IMAGE_SUFFIXES
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import read_text

COLUMNS = {  # key of other projects → key of a data.json
    "prompt": "cap",
    "vace_video": "src_video",
    "vace_video_mask": "src_video_mask",
    "vace_reference_image": "src_ref_images",
    "file_path": "video",
    "text": "cap",
    "control_file_path": "src_video",
    "object_file_path": "src_ref_images",
}
LISTS = ("data.json", "data.jsonl", "metadata.csv", "metadata.json", "metadata.jsonl", "metadata.tsv")
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"),
    *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ogv"),
)
_SIGNATURES = ({"video", "prompt"}, {"file_path", "text"})  # keys that only rows of other projects have
_FOLDERS = {"cropped": "src_video", "mask": "src_video_mask"}
_MAX_CAPTION = 1 << 20  # bytes


def rename_keys(row: Any) -> Any:
    """Rename the keys of a row of DiffSynth-Studio or VideoX-Fun to those of a data.json.

    Any other value is returned unchanged.
    """
    if not isinstance(row, Mapping) or "cap" in row or not any(keys <= row.keys() for keys in _SIGNATURES):
        return row
    return {COLUMNS.get(key, key): value for key, value in row.items()}


def find_list(folder: Path) -> Path | None:
    """Return the list of rows in a dataset's folder, or None if there is none."""
    return next((folder / name for name in LISTS if os.path.isfile(folder / name)), None)


def folder_rows(folder: Path, home: Path) -> Iterator[dict[str, Any] | DataError]:
    """Yield the rows of a folder of clips with captions. Paths are relative to `home`.

    A clip without a caption yields a DataError. Raises DataError if the folder contains no clips.
    """
    in_four = os.path.isdir(folder / "orig") and os.path.isdir(folder / "prompt")
    clips = _clips(folder / "orig" if in_four else folder)
    if not clips:
        raise DataError(
            "contains no clips",
            where=folder / "orig" if in_four else folder,
            expected=f"clips ({', '.join(VIDEO_SUFFIXES)}) with a caption of the same name in .txt",
        )
    beside = {name: _by_stem(folder / name) for name in _FOLDERS} if in_four else {}
    for clip in clips:
        text = (folder / "prompt" / clip.stem if in_four else clip).with_suffix(".txt")
        try:
            caption = read_text(text, DataError, max_bytes=_MAX_CAPTION).strip()
        except DataError as error:
            yield DataError(f"no caption: {error}", where=os.path.relpath(clip, folder))
            continue
        row = {"video": os.path.relpath(clip, home), "cap": caption}
        for name, files in beside.items():
            if clip.stem in files:
                row[_FOLDERS[name]] = os.path.relpath(files[clip.stem], home)
        yield row


def _clips(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return sorted(path for path in found if not path.name.startswith("."))


def _by_stem(folder: Path) -> dict[str, Path]:
    """Return the clips, images and image folders of a folder by their names without suffix."""
    if not os.path.isdir(folder):
        return {}
    known = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
    entries = sorted(path for path in folder.iterdir() if path.is_dir() or path.suffix.lower() in known)
    return {path.stem if path.suffix.lower() in known else path.name: path for path in entries}
