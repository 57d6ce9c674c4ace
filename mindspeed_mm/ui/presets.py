"""Settings that users save by name, each in a JSON file. Does not import torch or gradio."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import read_json_object, write_json
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.outputs import name_problem


class Presets:
    """A folder of saved settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names in sorted order."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def save(self, name: str, fields: Mapping[str, Any]) -> str:
        """Save `fields` by name, replacing existing settings of that name, and return the stripped name.

        Raises ConfigError if the name is not a valid file name.
        """
        name = name.strip()
        problem = name_problem(name, ".json") or ("begins with a dot" if name.startswith(".") else "")
        if problem:
            raise ConfigError(problem if name else "is missing", where="name", fix="choose a short name")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{name}.json", dict(fields))
        return name

    def load(self, name: str) -> dict[str, Any]:
        """Load the settings of a name. Raises ConfigError if there are none."""
        if name not in self.names():
            raise ConfigError("no settings of that name", where=f"{name:.60}")
        values = read_json_object(self.folder / f"{name}.json")
        given = values.pop("inputs", ())
        return {
            **parse(RequestConfig, values, name).model_dump(mode="json", exclude_unset=True),
            "inputs": given,
        }
