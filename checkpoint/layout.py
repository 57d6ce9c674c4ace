"""How a target changes on disk.

Everything is written and checked in a hidden folder first, then moved into place.

Whatever kills a conversion, the target is the old one, the new one or absent, never a mixture; where it is
absent, the next run begins by putting the old one back.
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
LEAVING, LEFT = "leaving", "left"  # where old entries wait: some of them, all of them


@contextlib.contextmanager
def staging(place: Path, name: str, *, owned: Sequence[str] = (), last: str = "") -> Iterator[Path]:
    """An empty hidden folder under `place` for one conversion, removed afterwards.

    Raises LaunchError if one is running.

    What a killed conversion had moved out of the way is put back first: `owned` and `last` as for
    `replace_entries`. With `last` the whole of `place` is the target and gets the lock; else its file `name`
    alone.
    """
    folder = place / f".{name}{_STAGING}"
    held = False
    try:
        with lock_folder(place if last else folder, choose="target_path"):
            held = True
            folder.mkdir(exist_ok=True)
            if last and put_back(folder, place, owned, last=last):
                logger.info(f"{place}: put back what an interrupted conversion had moved away")
            sweep([place], more=lambda path: path != folder and _is_killed(path))
            if _empty(folder):
                logger.info(f"{folder}: removed what an interrupted conversion had written")
            try:
                yield folder
            finally:
                _empty(folder)
                if last:
                    folder.rmdir()
    finally:
        if held:  # a killed conversion made it, so that the lock leaves it
            with contextlib.suppress(OSError):
                folder.rmdir()


def _empty(folder: Path) -> bool:
    """Remove all but the lock; whether there was anything."""
    found = [entry for entry in folder.iterdir() if entry.name != LOCK_FILE]
    for entry in found:
        _remove(entry)
    return bool(found)


def _is_killed(path: Path) -> bool:
    """Whether `path` is the hidden folder of one file's conversion that was killed on this machine."""
    if not path.name.endswith(_STAGING):
        return False
    holder = read_holder(path)
    return holder is not None and holder.is_local and not holder.is_alive


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """What the disk refuses while the files of `target` are written, as one WeightsError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise WeightsError(
            f"cannot be written: {reason}", where=target, fix="free space or choose another target_path"
        ) from None


def check_space(place: Path, nbytes: int) -> None:
    """Raises WeightsError when the disk under `place` has less than `nbytes` free, before any write."""
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise WeightsError(
            f"needs {size_text(nbytes)}, but only {size_text(free)} are free on the disk",
            where=place,
            fix="free space or choose another target_path",
        )


def replace_file(staged: Path, target: Path) -> None:
    """Move one finished file over the target: readers see the old one or the new one."""
    os.replace(staged, target)
    _sync(target.parent)


def replace_entries(staged: Path, folder: Path, target: Path, owned: Sequence[str], *, last: str) -> None:
    """Move all entries of `staged` into `target`, `last` at the end, in place of what matches `owned` there.

    The old entries wait in `folder`, the hidden one, until all is done. On an error they are put back.
    """
    leaving, left = folder / LEAVING, folder / LEFT
    leaving.mkdir()
    try:
        for entry in sorted({path for pattern in owned for path in target.glob(pattern)}):
            os.rename(entry, leaving / entry.name)
        os.rename(leaving, left)  # from here on, whatever `owned` names in the target is new
        _sync(target)
        _move_all(staged, target, last)
    except OSError:
        put_back(folder, target, owned, last=last)
        raise


def put_back(folder: Path, target: Path, owned: Sequence[str], *, last: str) -> bool:
    """Undo a replacement that did not come to its end; whether there was one.

    May be interrupted and done again.
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
