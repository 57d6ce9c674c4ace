"""A replacement that is cut off anywhere leaves the old target, at once or with the next run.

There is never neither.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint.layout import replace_entries, restore_entries, staging

OWNED, LAST = ("*.safetensors", "*.json"), "index.json"


def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    target, hidden = tmp_path / "target", tmp_path / "target" / ".folder.mm-convert"
    new = hidden / "new"
    new.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", LAST, "notes.txt"):
        (target / name).write_text("old")
    for name in ("a.safetensors", "c.safetensors", LAST):
        (new / name).write_text("new")
    return target, hidden, new


def state(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in target.iterdir() if path.is_file()}


OLD = {"a.safetensors": "old", "b.safetensors": "old", LAST: "old", "notes.txt": "old"}
NEW = {"a.safetensors": "new", "c.safetensors": "new", LAST: "new", "notes.txt": "old"}


class Killed(BaseException):
    """Stands for a kill: nothing that cleans up after errors sees it."""


def rename_until(count: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    rename, done = os.rename, []

    def limited(source: Path, target: Path) -> None:
        done.append(source)
        if len(done) == count:
            raise error(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", limited)


@pytest.mark.parametrize("count", range(1, 8))
def test_error_in_the_middle_puts_the_old_entries_back(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, hidden, new = folders(tmp_path)
    rename_until(count, OSError, monkeypatch)
    with pytest.raises(OSError, match="No space"):
        replace_entries(new, hidden, target, OWNED, last=LAST)
    assert state(target) == OLD


@pytest.mark.parametrize("count", range(1, 8))
def test_next_run_after_kill_restores_files_first(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, hidden, new = folders(tmp_path)
    with monkeypatch.context() as killed:
        rename_until(count, Killed, killed)
        with pytest.raises(Killed):
            replace_entries(new, hidden, target, OWNED, last=LAST)
    with pytest.raises(OSError, match="disk full"), staging(target, "folder", owned=OWNED, last=LAST):
        raise OSError("disk full")
    assert state(target) == OLD


def test_finished_replacement_is_not_undone(tmp_path: Path) -> None:
    target, hidden, new = folders(tmp_path)
    replace_entries(new, hidden, target, OWNED, last=LAST)
    restore_entries(hidden, target, OWNED, last=LAST)
    assert state(target) == NEW
