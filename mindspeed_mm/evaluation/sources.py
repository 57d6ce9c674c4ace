"""Reads `--data`: the true clips of a dataset, or the inputs and labels of VACE-Benchmark."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.data.manifest import read_manifest
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import display_path, read_text, stat_path

_LABELS = {"layout": "layout_bbox"}  # VACE-Benchmark folder → task of `vace prepare`, where names differ
_CASE_FILES = re.compile(r"src_(?:video|mask)\.mp4|src_ref_image_\d+\.(?:png|jpe?g)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DataCase:
    """A row of a dataset, or a folder of the benchmark."""

    name: str
    prompts: tuple[str, ...] = ()
    task: str = ""
    src_video: Path | None = None
    src_mask: Path | None = None
    references: tuple[Path, ...] = ()
    truth: Path | None = None

    def is_prompt(self, prompt: str) -> bool:
        """Return whether a video with this prompt should equal the true clip."""
        return not prompt or not self.prompts or prompt in self.prompts


@dataclass(frozen=True)
class EvalData:
    """Cases that are looked up by the inputs or the name of a result."""

    cases: Sequence[DataCase]

    @classmethod
    def open(cls, path: str | Path) -> EvalData:
        """Open a data.txt, .json, .jsonl or .csv, or the VACE-Benchmark folder. Raises DataError."""
        stat_path(path, DataError)
        return cls(benchmark_cases(Path(path)) if Path(path).is_dir() else dataset_cases(Path(path)))

    def find(self, name: str, inputs: Mapping[str, Any], prompt: str) -> DataCase | None:
        """Return the case with the inputs of a result, or else with its name. Prefers one with its prompt."""
        key = _key(inputs.get("video"), inputs.get("mask"), inputs.get("images") or ())
        by_inputs = [case for case in self.cases if any(key) and key == _key_of(case)]
        by_name = [case for case in self.cases if case.name in (name, name.rpartition("/")[2])]
        for found in (by_inputs, by_name):
            if found:
                return next((case for case in found if prompt in case.prompts), found[0])
        return None


def dataset_cases(path: Path) -> list[DataCase]:
    """Return one case for each row of a dataset."""
    return [
        DataCase(
            name=record.video.stem,
            prompts=record.captions,
            src_video=record.src_video,
            src_mask=record.src_mask,
            references=tuple(record.src_ref_images),
            truth=record.video,
        )
        for record in read_manifest(path)
    ]


def benchmark_cases(folder: Path) -> list[DataCase]:
    """Return one case for each folder with a src_video, src_mask or references. Raises DataError if none."""
    found = []
    for place, _, names in sorted(os.walk(folder)):
        files = sorted(Path(place, name) for name in names if _CASE_FILES.fullmatch(name))
        if not files:
            continue
        label = Path(place).name
        by_name = {path.name.lower(): path for path in files}
        prompt = Path(place) / "prompt.txt"
        found.append(
            DataCase(
                name=label,
                task=_LABELS.get(label, label),
                prompts=(read_text(prompt, DataError).strip(),) if prompt.is_file() else (),
                src_video=by_name.get("src_video.mp4"),
                src_mask=by_name.get("src_mask.mp4"),
                references=tuple(path for path in files if "ref_image" in path.name.lower()),
            )
        )
    if not found:
        raise DataError(
            "contains no cases",
            where=display_path(folder),
            expected=(
                "folders with src_video.mp4, src_mask.mp4 or src_ref_image_1.png, as in "
                "VACE-Benchmark/assets/examples"
            ),
            fix="pass a data.json or the folder of VACE-Benchmark",
        )
    return found


def _key_of(case: DataCase) -> tuple[str, str, tuple[str, ...]]:
    return _key(case.src_video, case.src_mask, case.references)


def _key(video: Any, mask: Any, images: Sequence[Any]) -> tuple[str, str, tuple[str, ...]]:
    return _real(video), _real(mask), tuple(map(_real, images))


def _real(path: str | Path | None) -> str:
    return os.path.realpath(path) if path else ""
