"""The LoRAs that requests may name: the files and folders at the top level of a folder on the server.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean


class Loras:
    """The LoRAs of a server. Names from clients are compared with file names, and never opened as paths."""

    def __init__(self, folder: str | Path | None) -> None:
        """`folder`: the folder of LoRAs. None means that requests cannot name a LoRA."""
        self.folder = None if folder is None else Path(folder).absolute()

    def names(self) -> list[str]:
        """Return the names that are in the folder now."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))

    def check(self, uses: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError for a LoRA that the server does not have."""
        known = self.names()
        for number, use in enumerate(uses):
            name = str(use["path"])
            if name not in known:
                raise ConfigError(
                    f"no LoRA {name!r:.80} on this server{did_you_mean(name, known)}",
                    where=f"loras[{number}].path",
                    expected=f"one of {', '.join(known)}" if known else "",
                    fix="" if known else "remove loras",
                )

    def found(self, uses: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return `uses` with each name replaced by the path of its file. Raises ConfigError."""
        self.check(uses)
        assert self.folder is not None or not uses
        return [{**use, "path": str(Path(self.folder or "") / str(use["path"]))} for use in uses]
