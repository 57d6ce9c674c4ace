"""Reads the videos of a results folder with their inputs.

Supports the layout of this package (NAME.mp4, NAME.json, NAME/) and that of the published tool
(…/out_video.mp4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, field_validator

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.config import ClipPolicy
from mindspeed_mm.data.images import brightness, read_image
from mindspeed_mm.data.sample import Inputs
from mindspeed_mm.data.video import open_video
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.evaluation.sample import PixelMask, Pixels, Sample, kind_of
from mindspeed_mm.evaluation.sources import DataCase, EvalData
from mindspeed_mm.files import display_path, read_json_object, stat_path

_OUT = "out_video.mp4"  # output of the published tool, which makes one folder per video
_INPUTS = ("src_video.mp4", "src_mask.mp4")
_REFERENCE = re.compile(r"(?:reference|src_ref_image)_(\d+)\.(?:png|jpe?g)", re.IGNORECASE)


class _Known(Config):
    """A part of NAME.json. Keys that are not needed here are ignored."""

    model_config = ConfigDict(extra="allow")


class _Sampling(_Known):
    fps: float = Field(default=16.0, ge=0.001, le=1000)


class _Inputs(_Known):
    video: str | None = None
    mask: str | None = None
    images: tuple[str, ...] | None = None

    @field_validator("video", "mask", "images")
    @classmethod
    def _are_paths(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if "\0" in "".join(value or ()):
            raise ValueError("expected a path, got a string with a NUL character")
        return value


class _Task(_Known):
    type: str | None = None


class _Settings(_Known):
    """The keys of NAME.json that the scores depend on."""

    prompt: str | None = None
    sampling: _Sampling | None = None
    inputs: _Inputs | None = None
    task: _Task | None = None


@dataclass(frozen=True)
class Result:
    """A generated video on disk."""

    name: str
    video: Path
    folder: Path  # folder of the stored inputs; it need not exist
    settings: Mapping[str, Any] = field(default_factory=dict)  # empty without a settings file

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The paths of the inputs in the settings."""
        found = self.settings.get("inputs")
        return found if isinstance(found, Mapping) else {}

    @property
    def prompt(self) -> str:
        """The prompt, or "" if it is unknown."""
        return str(self.settings.get("prompt") or "")

    @property
    def references(self) -> list[Path]:
        """The reference images that are stored with the video."""
        return _references(self.folder)

    @property
    def input_files(self) -> list[Path]:
        """The inputs of the model that are stored with the video."""
        clips = [path for name in _INPUTS if (path := self.folder / name).is_file()]
        return [*clips, *_references(self.folder)]


def find_results(folder: Path) -> list[Result]:
    """Return the videos of a folder, sorted by name within each layout. Raises DataError if there is none."""
    stat_path(folder, DataError)
    if not folder.is_dir():
        raise DataError("got a file", where=display_path(folder), expected="a folder of results")
    found = [
        Result(path.stem, path, path.with_suffix(""), _settings(path))
        for path in sorted(folder.glob("*.mp4"))
        if path.name not in (*_INPUTS, _OUT)
    ]
    for path in sorted(folder.rglob(_OUT)):
        name = path.parent.relative_to(folder).as_posix()
        found.append(Result(folder.name if name == "." else name, path, path.parent))
    if not found:
        raise DataError(
            "contains no videos",
            where=display_path(folder),
            expected=f"NAME.mp4 and NAME.json, or NAME/{_OUT}",
            fix="pass the output_path of a generation run",
        )
    return found


def read_sample(result: Result, data: EvalData | None = None, task: str = "") -> Sample | None:
    """Read a video with its inputs, and the true clip if `data` has it.

    Returns None if the video has no settings, inputs or case in `data`. `task` applies if neither settings
    nor data name one. Raises DataError for files that cannot be read.
    """
    case = data.find(result.name, result.inputs, result.prompt) if data is not None else None
    if not (result.settings or result.input_files or case):
        return None
    output = _read(result.video)
    video, mask, references = _given(result, case, output)
    made = result.settings.get("task")
    options = dict(made) if isinstance(made, Mapping) else {}
    name = options.pop("type", "") or (case.task if case else "") or task
    for key in ("videos", "images"):
        options.pop(key, None)
    return Sample(
        name=result.name,
        output=output,
        fps=float(_sampling(result).get("fps", 16.0)),
        task=str(name) or kind_of(video is not None, mask, len(references)),
        options=options,
        prompt=result.prompt or (case.prompts[0] if case and case.prompts else ""),
        src_video=video,
        src_mask=mask,
        references=references,
        truth=_truth(result, case, output),
    )


def _given(
    result: Result, case: DataCase | None, output: Pixels
) -> tuple[Pixels | None, PixelMask | None, tuple[Pixels, ...]]:
    """Return src_video, src_mask and references.

    Reads the files stored with the video, or else the paths in its settings or in the data.
    """
    if result.input_files:
        video, mask = (path if (path := result.folder / name).is_file() else None for name in _INPUTS)
        return (
            None if video is None else _read(video),
            None if mask is None else brightness(_read(mask, mask=True)) > 127,
            tuple(map(read_image, _references(result.folder))),
        )
    paths, known = result.inputs, case or DataCase(name="")
    inputs = Inputs(
        src_video=paths.get("video") or known.src_video,
        src_mask=paths.get("mask") or known.src_mask,
        src_ref_images=tuple(paths.get("images") or known.references),
    )
    pictures = tuple(read_image(Path(str(path))) for path in inputs.src_ref_images)
    if inputs.src_video is None:
        return None, None, pictures
    return (*_resized(result, inputs, output), pictures)


def _truth(result: Result, case: DataCase | None, output: Pixels) -> Pixels | None:
    if case is None or case.truth is None or not case.is_prompt(result.prompt):
        return None
    return _resized(result, Inputs(src_video=case.truth), output)[0]


def _resized(result: Result, inputs: Inputs, output: Pixels) -> tuple[Pixels, PixelMask | None]:
    """Return src_video and src_mask with the frames and size that the run used, by the run's own rules."""
    from mindspeed_mm.data.conditions import load_conditions

    sampling = _sampling(result)
    known = {key: value for key, value in sampling.items() if key in ClipPolicy.model_fields}
    policy = parse(ClipPolicy, {**known, "num_frames": len(output)}, str(result.video))
    read = load_conditions(
        Inputs(src_video=inputs.src_video, src_mask=inputs.src_mask), policy, output.shape[1:3]
    )
    mask = None if read.src_mask is None else np.asarray(read.src_mask) > 127
    return np.asarray(read.src_video, np.uint8), mask


def _settings(video: Path) -> Mapping[str, Any]:
    """Read NAME.json. Raises DataError for invalid values."""
    path = video.with_suffix(".json")
    if not path.is_file():
        return {}
    values = read_json_object(path, DataError)
    try:
        parse(_Settings, values, display_path(path))
    except ConfigError as error:
        raise error.as_kind(DataError) from None
    return values


def _sampling(result: Result) -> Mapping[str, Any]:
    found = result.settings.get("sampling")
    return found if isinstance(found, Mapping) else {}


def _references(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    numbered = {
        int(match[1]): path for path in folder.iterdir() if (match := _REFERENCE.fullmatch(path.name))
    }
    return [numbered[number] for number in sorted(numbered)]


def _read(path: Path, *, mask: bool = False) -> Pixels:
    reader = open_video(path, mask=mask)
    return reader.read(range(reader.num_frames))
