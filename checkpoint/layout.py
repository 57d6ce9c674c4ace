"""How a target changes on disk: everything is written and checked in a hidden folder first, then moved into place.

Whatever kills a conversion, the target is the old one or absent, never a mixture; the next run clears what was left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindspeed_mm.errors import WeightsError


@contextlib.contextmanager
def staging(place: Path, name: str) -> Iterator[Path]:
    """An empty hidden folder under `place` for one conversion, removed afterwards. Raises WeightsError if one is running."""
    made = _make_parents(place)
    folder = place / f".{name}.mm-convert"
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsError(f"{place}: another mm-convert is writing there; wait for it") from None
        for left in folder.iterdir():
            _remove(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:  # gone again if nothing came into them
                with contextlib.suppress(OSError):
                    parent.rmdir()
    finally:
        os.close(handle)


def replace_file(staged: Path, target: Path) -> None:
    """Move one finished file over the target: readers see the old one or the new one."""
    os.replace(staged, target)
    _sync(target.parent)


def replace_entries(staged: Path, target: Path, owned: Sequence[str], *, trash: Path, last: str) -> None:
    """Move all entries of `staged` into the folder `target`, `last` at the end, in place of what matches `owned` there.

    The old entries go first, so that between the two the target has no weights.
    """
    trash.mkdir()
    for old in sorted({path for pattern in owned for path in target.glob(pattern)}):
        os.rename(old, trash / old.name)
    _sync(target)
    for entry in sorted(staged.iterdir(), key=lambda path: (path.name == last, path.name)):
        os.rename(entry, target / entry.name)
    _sync(target)


def _make_parents(place: Path) -> list[Path]:
    """Make `place`; the folders that were not there, innermost first."""
    missing = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(f"{place}: cannot be made: {error.strerror}; choose another target_path") from None
    return missing


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
