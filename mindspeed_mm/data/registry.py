"""Registry of datasets, and the data JSON that selects one. Code is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny, field_validator

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.config import FeatureDatasetConfig, LoaderConfig, VaceDatasetConfig
from mindspeed_mm.files import read_json
from mindspeed_mm.registry import Registry


@dataclass(frozen=True)
class DatasetSpec:
    """One type of dataset, selected by `dataset_param.dataset_type` of the data JSON."""

    config: type[Config]  # schema of the JSON's `dataset_param`
    build: str  # "module:callable", called build(config) → a map-style dataset


DATASETS: Registry[DatasetSpec] = Registry("dataset", "mindspeed_mm.datasets")
DATASETS.add("vace", DatasetSpec(config=VaceDatasetConfig, build="mindspeed_mm.data.dataset:VaceDataset"))
DATASETS.add(
    "feature", DatasetSpec(config=FeatureDatasetConfig, build="mindspeed_mm.data.dataset:FeatureDataset")
)


class DataConfig(Config):
    """A data JSON. The schema of `dataset_param` is the one registered for its dataset_type."""

    dataset_param: SerializeAsAny[Config]
    dataloader_param: LoaderConfig = LoaderConfig()

    @field_validator("dataset_param", mode="before")
    @classmethod
    def _by_type(cls, values: Any) -> Any:
        return _parse_dataset(values, "dataset_param", []) if isinstance(values, Mapping) else values

    @property
    def dataset_type(self) -> str:
        """The registered name of the dataset."""
        return str(getattr(self.dataset_param, "dataset_type", "vace"))


def read_data_config(path: str | Path, notes: list[str] | None = None) -> DataConfig:
    """Read a data JSON. `notes` collects keys that have no effect.

    Raises ConfigError with the address of the invalid value.
    """
    return parse_data_config(read_json(path), str(path), notes)


def parse_data_config(values: Any, where: str, notes: list[str] | None = None) -> DataConfig:
    """Parse the values of a data JSON. Error addresses start with `where`. Raises ConfigError."""
    if isinstance(values, Mapping) and isinstance(values.get("dataset_param"), Mapping):
        found: list[str] = [] if notes is None else notes
        values = {
            **values,
            "dataset_param": _parse_dataset(values["dataset_param"], f"{where}:dataset_param", found),
        }
    return parse(DataConfig, values, where, notes)


def _parse_dataset(values: Mapping[str, Any], where: str, notes: list[str]) -> Config:
    return parse(DATASETS.get(str(values.get("dataset_type", "vace"))).config, values, where, notes)
