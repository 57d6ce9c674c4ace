"""Find settings that do not follow from weight shapes, in a checkpoint or in the files next to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import parse_json, read_json
from mindspeed_mm.models.find import Files
from mindspeed_mm.models.wan.config_json import read_hints


class Hints(NamedTuple):
    """Settings of a model that were found in a file."""

    hints: dict[str, Any]  # by the field names of VaceConfig
    path: Path | None = None
    settings: Mapping[str, Any] = {}  # all keys of the file


def find_hints(files: Files, saved: Any) -> Hints:
    """Find the settings of a model.

    Reads the first of these that has any: the checkpoint itself (`saved`), `<file>.json`, the nearest
    config.json, a run's job.json.
    """
    first = files.paths[0]
    values = parse_json(saved, str(first), WeightsError) if isinstance(saved, str) else saved
    if hints := read_hints(values):
        return Hints(hints, first, values)
    beside = [first.with_suffix(".json")] if len(files.paths) == 1 and first.is_file() else []
    for path in (*beside, *(folder / "config.json" for folder in files.config_dirs)):
        values = _json(path)
        if hints := read_hints(values):
            return Hints(hints, path, values)
    for folder in files.config_dirs:
        if predictor := _find_predictor(_json(folder / "job.json")):
            dit = predictor["vace_dit"]
            hints = {**predictor, "vace_layers": dit.get("vace_layers"), "vace_in_dim": dit.get("in_dim")}
            return Hints(hints, folder / "job.json", predictor)
    return Hints({})


def _json(path: Path) -> Any:
    try:
        return read_json(path, WeightsError) if path.is_symlink() or path.exists() else None
    except WeightsError as error:
        raise error.advise("correct or remove it") from None


def _find_predictor(values: Any) -> Mapping[str, Any] | None:
    if not isinstance(values, dict):
        return None
    if "num_heads" in values and isinstance(values.get("vace_dit"), dict):
        return values
    return next((found for inner in values.values() if (found := _find_predictor(inner)) is not None), None)
