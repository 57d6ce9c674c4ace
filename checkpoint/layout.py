"""Replaces a target on disk.

All files are written and checked in a hidden folder, then moved into place.

After a kill, the target is the old one, the new one or absent, but never a mix. If it is absent, the next
run first restores the old one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.locks import LOCK_FILE, lock_folder, read_holder
from mindspeed_mm.log import get_logger
from mindspeed_mm.progress import size_text

logger = get_logger(__name__)
_STAGING = ".mm-convert"
LEAVING, LEFT = "leaving", "left"  # folders of the old entries, during the move and after it


@contextlib.contextmanager
def staging(place: Path, name: str, *, owned: Sequence[str] = (), last: str = "") -> Iterator[Path]:
    """Make an empty hidden folder under `place` for one conversion, and remove it afterwards.

    First restores the entries that a killed conversion had moved out of `place`. For `owned` and `last`, see
    `replace_entries`. With `last`, the target is the whole folder `place`, which is locked. Without it, the
    target is the file `name` in `place`, and only the hidden folder is locked.

    Raises LaunchError if another conversion to the same target is running.
    """
    folder = place / f".{name}{_STAGING}"
    held = False
    try:
        with lock_folder(place if last else folder, choose="target_path"):
            held = True
            folder.mkdir(exist_ok=True)
            if last and restore_entries(folder, place, owned, last=last):
                logger.info(f"{place}: restored the files that an interrupted conversion had moved")
            sweep([place], more=lambda path: path != folder and _is_killed(path))
            if _empty(folder):
                logger.info(f"{folder}: removed the files of an interrupted conversion")
            try:
                yield folder
            finally:
                _empty(folder)
                if last:
                    folder.rmdir()
    finally:
        if held:  # the lock does not remove a folder created by a killed conversion
            with contextlib.suppress(OSError):
                folder.rmdir()


def _empty(folder: Path) -> bool:
    """Remove all entries except the lock. Returns whether there were any."""
    found = [entry for entry in folder.iterdir() if entry.name != LOCK_FILE]
    for entry in found:
        _remove(entry)
    return bool(found)


def _is_killed(path: Path) -> bool:
    """Return whether `path` is the hidden folder of a killed conversion to a file on this machine."""
    if not path.name.endswith(_STAGING):
        return False
    holder = read_holder(path)
    return holder is not None and holder.is_local and not holder.is_alive


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Convert errors in writing the files of `target` to a WeightsError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise WeightsError(
            f"cannot be written: {reason}", where=target, fix="free space or choose another target_path"
        ) from None


def check_space(place: Path, nbytes: int) -> None:
    """Raise WeightsError if the disk of `place` has less than `nbytes` free. Call it before any write."""
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise WeightsError(
            f"needs {size_text(nbytes)}, but only {size_text(free)} are free on the disk",
            where=place,
            fix="free space or choose another target_path",
        )


def replace_file(staged: Path, target: Path) -> None:
    """Replace the target with a finished file atomically: readers see the old file or the new one."""
    os.replace(staged, target)
    _sync(target.parent)


def replace_entries(staged: Path, folder: Path, target: Path, owned: Sequence[str], *, last: str) -> None:
    """Replace the entries of `target` that match `owned` with all entries of `staged`.

    The entry `last` is moved last. Until then, the old entries are kept in the hidden `folder`. On an error
    they are restored.
    """
    leaving, left = folder / LEAVING, folder / LEFT
    leaving.mkdir()
    try:
        for entry in sorted({path for pattern in owned for path in target.glob(pattern)}):
            os.rename(entry, leaving / entry.name)
        os.rename(leaving, left)  # from now on, all entries of the target that match `owned` are new
        _sync(target)
        _move_all(staged, target, last)
    except OSError:
        restore_entries(folder, target, owned, last=last)
        raise


def restore_entries(folder: Path, target: Path, owned: Sequence[str], *, last: str) -> bool:
    """Undo an incomplete replacement. Returns whether there was one.

    It can be interrupted and called again.
    """
    leaving, left = folder / LEAVING, folder / LEFT
    if left.is_dir() and not (target / last).exists():
        for path in {path for pattern in owned for path in target.glob(pattern)}:
            _remove(path)
        os.rename(left, leaving)
    if not leaving.is_dir():
        return False
    _move_all(leaving, target, last)
    return True


def _move_all(source: Path, target: Path, last: str) -> None:
    for entry in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        os.rename(entry, target / entry.name)
    _sync(target)


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
