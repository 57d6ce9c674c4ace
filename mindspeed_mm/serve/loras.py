"""The LoRAs that requests may name: files and folders directly in one folder of the server. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean


class Loras:
    """They are named by their file names. What a client sends is compared with these and never opened."""

    def __init__(self, folder: str | Path | None) -> None:
        """`folder`: None = requests name no LoRA."""
        self.folder = None if folder is None else Path(folder).absolute()

    def names(self) -> list[str]:
        """What is in the folder now."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))

    def check(self, uses: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError for a LoRA that the server does not have."""
        known = self.names()
        for number, use in enumerate(uses):
            name = str(use["path"])
            if name not in known:
                raise ConfigError(
                    f"no LoRA {name!r:.80} on this server{did_you_mean(name, known)}",
                    where=f"loras[{number}].path",
                    expected=f"one of {', '.join(known)}" if known else "",
                    fix="" if known else "leave loras out",
                )

    def found(self, uses: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The same uses with the paths of their files. Raises ConfigError."""
        self.check(uses)
        assert self.folder is not None or not uses
        return [{**use, "path": str(Path(self.folder or "") / str(use["path"]))} for use in uses]
