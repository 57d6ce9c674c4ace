"""The two dataset types of data JSONs: `feature` (the output of extraction) and `vace` (raw clips)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mindspeed_mm.data import csv_rows
from mindspeed_mm.data.conditions import PixelSample, TensorSample, to_sample
from mindspeed_mm.data.config import FeatureDatasetConfig, VaceDatasetConfig, VideoConfig
from mindspeed_mm.data.features import NULL_PROMPT_FILE, read_feature, read_info, read_null_prompt
from mindspeed_mm.data.manifest import read_manifest
from mindspeed_mm.data.sample import FeatureRecord, SampleRecord
from mindspeed_mm.data.transforms import load_pixels
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import LIST_BYTES, json_lines, parse_json, read_text, regular_file

FEATURE_FOLDER = "features"
LISTING = "data.jsonl"
_MAX_SIZE = 1 << 20  # maximum size of an axis of the latents


class RawDataset(Protocol):
    """Interface that feature extraction requires of a dataset of clips, in this package or another."""

    @property
    def records(self) -> Sequence[SampleRecord]:
        """All rows, in order."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All settings that change the pixels that `load` returns. They are part of every feature's key."""
        ...

    @property
    def load(self) -> Callable[[SampleRecord], PixelSample]:
        """Return a picklable function that reads one row in another process."""
        ...


class VaceDataset:
    """Raw clips listed in a data.txt; item i is a VideoSample."""

    def __init__(self, config: VaceDatasetConfig, records: Sequence[SampleRecord] | None = None) -> None:
        source = config.basic_parameters
        self.config = config
        self.records = read_manifest(source.data_path, source.data_folder) if records is None else records

    @property
    def settings(self) -> Mapping[str, Any]:
        """All `preprocess_parameters` that change pixels."""
        return pixel_settings(self.config.preprocess_parameters)

    @property
    def load(self) -> Callable[[SampleRecord], PixelSample]:
        """Return the function that reads one row."""
        return partial(load_pixels, config=self.config.preprocess_parameters)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TensorSample:
        return to_sample(self.load(self.records[index]))


def pixel_settings(config: VideoConfig) -> dict[str, Any]:
    """Return the settings that determine the pixels read from a clip."""
    names = ("num_frames", "max_hxw", "train_fps", "short_clip", "long_clip", "soft_mask")
    found = config.model_dump(include=set(names))
    # The default is left out so that existing features keep their names.
    return {**found, "wan_frames": True} if config.wan_frames else found


class FeatureDataset:
    """Features listed in a data.jsonl (or a JSON list, or published `.pt` files).

    Item i is a FeatureRecord.
    """

    def __init__(self, config: FeatureDatasetConfig) -> None:
        source = config.basic_parameters
        self.listing = Path(source.data_path)
        self.folder = Path(source.data_folder) if source.data_folder else self.listing.parent
        self.rows = _read_listing(self.listing)
        self.verify = config.verify_checksums
        self._infos: dict[int, tuple[int, int, int, int]] = {}  # shapes that are missing from the list
        self._sizes: tuple[int | None, int | None] = (None, None)  # text_dim and text_len of the model

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> FeatureRecord:
        try:
            record = read_feature(self.path(index), verify=self.verify)
            self._check_prompts(index, [(len(prompt), prompt.shape[1]) for prompt in record.prompt_embeds])
        except DataError as error:
            raise error.at(self._address(index)) from None
        found = (record.latents.shape[1], record.latents.shape[2], record.latents.shape[3])
        self._compare(index, found, record.num_refs)
        return replace(record, task=self._task(index))

    def path(self, index: int) -> Path:
        """Return the file of a row: in the data folder, in its `features` folder, or the path as written."""
        file = self.rows[index]["file"]
        candidates = (self.folder / file, self.folder / FEATURE_FOLDER / file, Path(file))
        return next((file for file in candidates if os.path.isfile(file)), candidates[0])  # False for a NUL

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """Return (R+F, h, w, R) from the list, or else the file. Samples of equal shape can be stacked."""
        refs = self.rows[index].get("num_refs")
        return (*self._grid(index), refs if isinstance(refs, int) else self._info(index)[3])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks named in the list, sorted."""
        return tuple(sorted({self._task(index) for index in range(len(self.rows))} - {""}))

    def _task(self, index: int) -> str:
        return self.rows[index].get("task") or ""

    def check(self, index: int, *, text_dim: int | None, text_len: int | None) -> None:
        """Check that the header of one row's file matches a model of these sizes.

        A published `.pt` has no header; its sizes are checked when it is read. Raises DataError.
        """
        self._sizes = (text_dim, text_len)
        path = self.path(index)
        if path.suffix == ".pt":
            try:
                regular_file(path, DataError)
            except DataError as error:
                raise error.at(self._address(index)) from None
            return
        try:
            info = read_info(path, verify=False)  # checksums are compared when the row is read
            self._check_prompts(index, info.prompts)
        except DataError as error:
            raise error.at(self._address(index)) from None
        self._compare(index, info.shape, info.num_refs)

    def check_null_prompt(self, text_dim: int, text_len: int | None = None) -> None:
        """Raise DataError if there is a null prompt that a model of these sizes cannot use."""
        path = self._null_prompt_path
        if path is not None and self.null_prompt is not None:
            _check_prompt(path, len(self.null_prompt), self.null_prompt.shape[1], text_dim, text_len)

    @cached_property
    def null_prompt(self) -> Tensor | None:
        """The embedding [L, text_dim] of the empty caption; None if extraction stored none."""
        path = self._null_prompt_path
        return None if path is None else read_null_prompt(path, verify=self.verify)

    @property
    def _null_prompt_path(self) -> Path | None:
        folders = dict.fromkeys((self.folder, self.listing.parent, self.folder.parent))
        candidates = (folder / NULL_PROMPT_FILE for folder in folders)
        return next((path for path in candidates if os.path.lexists(path)), None)

    def _address(self, index: int) -> str:
        return f"{self.listing.name}[{index}]"

    def _check_prompts(self, index: int, prompts: Sequence[tuple[int, int]]) -> None:
        for length, width in prompts:
            _check_prompt(self.path(index), length, width, *self._sizes)

    def _compare(self, index: int, shape: tuple[int, int, int], num_refs: int) -> None:
        """Raise DataError if the list contradicts the file."""
        row = self.rows[index]
        for key, found in (("shape", list(shape)), ("num_refs", num_refs)):
            if row.get(key) is not None and row[key] != found:
                raise DataError(
                    f"{key} is listed as {row[key]}, {self.path(index)} has {found}",
                    where=self._address(index),
                    fix="extract the features again",
                )

    def _grid(self, index: int) -> tuple[int, int, int]:
        shape = self.rows[index].get("shape")
        return (shape[0], shape[1], shape[2]) if shape else self._info(index)[:3]

    def _info(self, index: int) -> tuple[int, int, int, int]:
        if index not in self._infos:
            try:
                info = read_info(self.path(index), verify=self.verify)
            except DataError as error:
                raise error.at(self._address(index)) from None
            self._infos[index] = (*info.shape, info.num_refs)
        return self._infos[index]


def _check_prompt(path: Path, length: int, width: int, text_dim: int | None, text_len: int | None) -> None:
    if text_dim not in (None, width):
        raise DataError(
            f"prompt_ids has width {width}",
            where=path,
            expected=f"predictor.text_dim {text_dim}",
            fix="extract the features again",
        )
    if text_len is not None and length > text_len:
        raise DataError(
            f"prompt_ids has {length} tokens, more than predictor.text_len {text_len}",
            where=path,
            fix="raise it, or extract with a smaller tokenizer_config.model_max_length",
        )


def _read_listing(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() in csv_rows.SUFFIXES:
        raise DataError(
            "got CSV",
            where=path,
            expected=f"a {LISTING} of features",
            fix="extract features of these clips first",
        )
    try:
        text = read_text(path, DataError, max_bytes=LIST_BYTES)
    except DataError as error:
        raise error.advise("run feature extraction, which writes it") from None
    if text.lstrip().startswith("["):
        rows: list[dict[str, Any]] = parse_json(text, str(path), DataError)
    else:
        rows = [values for _, values in json_lines(text, str(path), DataError)]
    if not rows:
        raise DataError("lists no features", where=path, fix="extract features first")
    for index, row in enumerate(rows):
        _check_row(row, f"{path}[{index}]")
    return rows


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        is_clip = isinstance(row, dict) and "video" in row
        raise DataError(
            "is a clip, not a feature" if is_clip else "names no feature file",
            where=where,
            expected="an object with the key 'file'",
            fix="extract features first" if is_clip else f"use the {LISTING} that feature extraction writes",
        )
    shape = row.get("shape")
    if shape is not None and not (_is_counts(shape, at_least=1) and len(shape) == 3):
        raise DataError(
            f"got {shape!r:.60}", where=f"{where}.shape", expected="three positive integers [R+F, h, w]"
        )
    if row.get("task") is not None and not isinstance(row["task"], str):
        raise DataError(f"got {row['task']!r:.60}", where=f"{where}.task", expected="the name of a task")
    if row.get("num_refs") is not None and not _is_counts([row["num_refs"]], at_least=0):
        raise DataError(
            f"got {row['num_refs']!r:.60}", where=f"{where}.num_refs", expected="an integer from 0"
        )


def _is_counts(values: Any, *, at_least: int) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and at_least <= value < _MAX_SIZE for value in values
    )
