"""Restricts the page to paths inside one folder. Does not import torch or gradio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mindspeed_mm.errors import ConfigError

_MAX_FILES = 200  # maximum number of files in a list
_VISITED = 20_000  # maximum number of folders and files that a search visits
_DEPTH = 5
_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages"})


def inside(root: Path, text: str) -> Path:
    """Resolve the path `text` relative to `root`.

    Raises ConfigError if the path is missing, or if it is outside `root`, directly or through a link.
    """
    root = root.resolve()
    try:
        path = (root / text.strip()).resolve()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):
        raise ConfigError("is not a path", where=f"{text!r:.100}") from None
    if not path.is_relative_to(root):
        raise ConfigError(
            "is outside of the folder that this page may read",
            where=f"{text:.200}",
            fix="start vace ui with --root FOLDER",
        )
    if not exists:
        raise ConfigError("no such file or folder", where=f"{text:.200}", expected=f"a path inside {root}")
    return path


def find(root: Path, names: frozenset[str]) -> list[str]:
    """Find files with one of `names` inside `root`, newest first, as paths relative to `root`.

    Limits the depth, the number of entries visited, and the number of results.
    """
    found = sorted(_walk(root.resolve(), names), reverse=True)
    return [text for _, text in found[:_MAX_FILES]]


def _walk(root: Path, names: frozenset[str]) -> Iterator[tuple[float, str]]:
    visited = 0
    for folder, folders, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        visible = [name for name in folders if not name.startswith(".") and name not in _SKIPPED]
        folders[:] = sorted(visible) if depth < _DEPTH else []
        visited += 1 + len(files)
        if visited > _VISITED:
            return
        for name in names.intersection(files):
            path = Path(folder, name)
            try:
                yield path.stat().st_mtime, str(path.relative_to(root))
            except OSError:
                continue
