"""The two datasets of data JSONs: `feature` (what extraction wrote) and `vace` (raw clips)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mindspeed_mm.data import csv_rows
from mindspeed_mm.data.config import FeatureDatasetConfig, VaceDatasetConfig, VideoConfig
from mindspeed_mm.data.features import NULL_PROMPT_FILE, read_feature, read_info, read_null_prompt
from mindspeed_mm.data.manifest import read_manifest
from mindspeed_mm.data.sample import FeatureRecord, SampleRecord, VideoSample
from mindspeed_mm.data.transforms import PixelSample, load_pixels, to_sample
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import LIST_BYTES, json_lines, parse_json, read_text

FEATURE_FOLDER = "features"
LISTING = "data.jsonl"
_MAX_SIZE = 1 << 20  # of an axis of latents


class RawDataset(Protocol):
    """What feature extraction needs of a dataset of clips; a stranger's dataset answers the same three."""

    @property
    def records(self) -> Sequence[SampleRecord]:
        """All rows, in order."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Whatever changes the pixels that `load` gives; it becomes part of every feature's key."""
        ...

    @property
    def load(self) -> Callable[[SampleRecord], PixelSample]:
        """A picklable function that reads one row in another process."""
        ...


class VaceDataset:
    """Raw clips of a data.txt; item i is a VideoSample."""

    def __init__(self, config: VaceDatasetConfig, records: Sequence[SampleRecord] | None = None) -> None:
        source = config.basic_parameters
        self.config = config
        self.records = read_manifest(source.data_path, source.data_folder) if records is None else records

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything in `preprocess_parameters` that changes pixels."""
        return pixel_settings(self.config.preprocess_parameters)

    @property
    def load(self) -> Callable[[SampleRecord], PixelSample]:
        """Read one row."""
        return partial(load_pixels, config=self.config.preprocess_parameters)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> VideoSample:
        return to_sample(self.load(self.records[index]))


def pixel_settings(config: VideoConfig) -> dict[str, Any]:
    """The settings that decide which pixels come out of a clip."""
    names = ("num_frames", "max_hxw", "train_fps", "short_clip", "long_clip", "soft_mask")
    found = config.model_dump(include=set(names))
    return (
        {**found, "wan_frames": True} if config.wan_frames else found
    )  # so that earlier features keep their names


class FeatureDataset:
    """Features listed in a data.jsonl (or a JSON list, or published `.pt` files); item i is a FeatureRecord."""

    def __init__(self, config: FeatureDatasetConfig) -> None:
        source = config.basic_parameters
        self.listing = Path(source.data_path)
        self.folder = Path(source.data_folder) if source.data_folder else self.listing.parent
        self.rows = _read_listing(self.listing)
        self.verify = config.verify_checksums

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> FeatureRecord:
        try:
            record = read_feature(self.path(index), verify=self.verify)
        except DataError as error:
            raise DataError(f"{self.listing.name}[{index}]: {error}") from None
        found = (record.latents.shape[1], record.latents.shape[2], record.latents.shape[3])
        if found != self._grid(index):
            raise DataError(
                f"{self.listing.name}[{index}]: {self.path(index)} holds latents {list(found)}, not as listed"
            )
        return record

    def path(self, index: int) -> Path:
        """The file of one row: from the data folder, from its `features` folder, or as it stands."""
        file = self.rows[index]["file"]
        places = (self.folder / file, self.folder / FEATURE_FOLDER / file, Path(file))
        return next((place for place in places if os.path.isfile(place)), places[0])  # False for a NUL, too

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """(R+F, h, w, R): samples with one shape can be stacked. From the list; the file's header is read if it is not there."""
        refs = self.rows[index].get("num_refs")
        return (*self._grid(index), refs if isinstance(refs, int) else self._info(index)[3])

    def check(self, index: int, *, text_dim: int | None, text_len: int | None) -> None:
        """Look at the header of one row's file. Raises DataError where it is no feature, or not of a model of these sizes.

        A published `.pt` has no header: it is judged when it is read.
        """
        path, where = self.path(index), f"{self.listing.name}[{index}]"
        if path.suffix == ".pt":
            return
        try:
            info = read_info(path, verify=False)  # checksums are compared when its turn comes
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        row = self.rows[index]
        listed = {"shape": tuple(row["shape"]) if row.get("shape") else None, "num_refs": row.get("num_refs")}
        for key, found in (("shape", info.shape), ("num_refs", info.num_refs)):
            if listed[key] is not None and listed[key] != found:
                raise DataError(
                    f"{where}: {key} is listed as {listed[key]}, {path} has {found}; extract the features again"
                )
        for length, width in info.prompts:
            if text_dim not in (None, width):
                raise DataError(
                    f"{where}: {path}: prompt_ids has width {width}, expected predictor.text_dim {text_dim}"
                )
            if text_len is not None and length > text_len:
                raise DataError(
                    f"{where}: {path}: prompt_ids has {length} tokens, more than predictor.text_len {text_len}; raise it, "
                    "or extract with a smaller tokenizer_config.model_max_length"
                )

    def check_null_prompt(self, text_dim: int) -> None:
        """Raises DataError when the null prompt, if there is one, is of another width."""
        if self.null_prompt is not None and self.null_prompt.shape[1] != text_dim:
            raise DataError(
                f"{self._null_prompt_path}: prompt_ids has width {self.null_prompt.shape[1]}, expected predictor.text_dim "
                f"{text_dim}; extract the features again"
            )

    @cached_property
    def null_prompt(self) -> Tensor | None:
        """[L, text_dim], the embedding of the empty caption; None when extraction stored none."""
        path = self._null_prompt_path
        return None if path is None else read_null_prompt(path, verify=self.verify)

    @property
    def _null_prompt_path(self) -> Path | None:
        folders = dict.fromkeys((self.folder, self.listing.parent, self.folder.parent))
        return next(
            (folder / NULL_PROMPT_FILE for folder in folders if (folder / NULL_PROMPT_FILE).is_file()), None
        )

    def _grid(self, index: int) -> tuple[int, int, int]:
        shape = self.rows[index].get("shape")
        return (shape[0], shape[1], shape[2]) if shape else self._info(index)[:3]

    def _info(self, index: int) -> tuple[int, int, int, int]:
        row = self.rows[index]
        if "_info" not in row:
            info = read_info(self.path(index), verify=self.verify)
            row["_info"] = (*info.shape, info.num_refs)
        found: tuple[int, int, int, int] = row["_info"]
        return found


def _read_listing(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() in csv_rows.SUFFIXES:
        raise DataError(
            f"{path}: expected a {LISTING} of features, got CSV; extract features of these clips first"
        )
    try:
        text = read_text(path, DataError, max_bytes=LIST_BYTES)
    except DataError as error:
        raise DataError(f"{error}; feature extraction writes it") from None
    if text.lstrip().startswith("["):
        rows: list[dict[str, Any]] = parse_json(text, str(path), DataError)
    else:
        rows = [values for _, values in json_lines(text, str(path), DataError)]
    if not rows:
        raise DataError(f"{path}: lists no features; extract some first")
    for index, row in enumerate(rows):
        _check_row(row, f"{path}[{index}]")
    return rows


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        raise DataError(
            f"{where}: names no feature file under 'file'; is it a list of raw clips? Extract features first"
        )
    shape = row.get("shape")
    if shape is not None and not (_is_counts(shape, at_least=1) and len(shape) == 3):
        raise DataError(f"{where}.shape: expected three positive integers [R+F, h, w], got {shape!r:.60}")
    if row.get("num_refs") is not None and not _is_counts([row["num_refs"]], at_least=0):
        raise DataError(f"{where}.num_refs: expected an integer from 0, got {row['num_refs']!r:.60}")


def _is_counts(values: Any, *, at_least: int) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and at_least <= value < _MAX_SIZE for value in values
    )
