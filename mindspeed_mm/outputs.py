"""Checks that the results of a run can be written, before any work begins, and explains failed writes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import display_path
from mindspeed_mm.leftovers import NAME_BYTES, temporary_name

PATH_BYTES = 4095  # maximum length of a path that a system call accepts
_ROOM = 128  # bytes reserved for the names of files under an output folder
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x1f\x7f]")


def check_folder(path: str | Path, where: str, *, probe: bool = True) -> None:
    """Check that files can be created in folder `path`, which a run creates with its parents.

    Raises ConfigError.

    `where` names the flag or key. `probe` creates a folder there and removes it, because permission bits
    are not reliable. Without it, nothing that depends on the machine of the run is checked.
    """
    text = _checked_text(path, where)
    place = _nearest(Path(text), where)
    _check_names(text, place, where)
    if not probe:
        return
    trial = place / temporary_name("probe")
    try:
        os.mkdir(trial)
    except FileExistsError:
        pass
    except OSError as error:
        what = "" if place == Path(text) else f"{place}: "
        raise ConfigError(
            f"{what}cannot be written to: {error.strerror}", where=f"{where}: {text}", fix="choose another"
        ) from None
    with suppress(OSError):
        os.rmdir(trial)


def check_file(path: str | Path, where: str, *, probe: bool = True) -> None:
    """Check that the file `path` can be created or replaced. Raises ConfigError."""
    text = _checked_text(path, where)
    try:
        mode = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # which _check_names explains
            raise ConfigError(
                error.strerror or str(error), where=f"{where}: {display_path(text)}", fix="choose another"
            ) from None
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ConfigError(f"is {what}", where=f"{where}: {text}", fix="choose another file name")
    _check_names(text, _nearest(Path(text).parent, where), where)
    check_folder(Path(text).parent, where, probe=probe)


def check_names(folder: str | Path, names: Iterable[str], where: str) -> None:
    """Check that files with these `names` can be created in `folder`, and that none is a folder.

    Raises ConfigError.
    """
    for name in names:
        check_file(Path(folder) / name, where, probe=False)


def check_not_read(targets: Iterable[Path], inputs: Iterable[str | Path], where: str) -> None:
    """Check that no file to be written is also an input. Follows links.

    Raises ConfigError.
    """
    found = {key: target for target in targets if (key := _identity(target))}
    for path in inputs if found else ():
        if (key := _identity(path)) and (target := found.get(key)):
            raise ConfigError(
                f"would overwrite {display_path(target)}, which is an input",
                where=f"{where}: {display_path(target.parent)}",
                fix="choose another folder",
            )


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, or None if there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def name_problem(name: str, suffix: str) -> str:
    """Return why `name` with `suffix` cannot be a file name, or "" if it can."""
    if problem := text_problem(name):
        return problem
    if found := _CONTROL.search(name):
        return f"contains the control character {found[0]!r}"
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return "must be a name without / and \\"
    size, limit = len(name.encode()), NAME_BYTES - len(suffix)
    return (
        f"has {size} bytes in UTF-8, but a file name takes at most {limit} before {suffix}"
        if size > limit
        else ""
    )


def text_problem(text: str) -> str:
    """Return why `text` cannot be written to a file as UTF-8, or "" if it can."""
    found = _SURROGATE.search(text)
    return "" if found is None else f"contains half of a character (the lone surrogate {found[0]!r})"


def _checked_text(path: str | Path, where: str) -> str:
    text = os.fspath(path)
    if not text:
        raise ConfigError("is empty", where=where, fix="set a file or folder; . is the working directory")
    if "\0" in text:
        raise ConfigError(
            "contains a NUL character", where=f"{where}: {text!r:.200}", fix="use a path without it"
        )
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(
            text_problem(text), where=f"{where}: {text!r:.200}", fix="write the whole character"
        ) from None
    size, limit = len(os.fsencode(text)), PATH_BYTES - _ROOM
    if size > limit:
        raise ConfigError(
            f"has {size} bytes, but a path takes at most {limit}",
            where=f"{where}: {display_path(text)}",
            fix="choose a shorter one",
        )
    return text


def _nearest(path: Path, where: str) -> Path:
    """Return `path` or its nearest existing parent.

    Raises ConfigError if a file is in the way.
    """
    for folder in (path, *path.absolute().parents):
        try:
            mode = os.stat(folder).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if folder.is_symlink():
                raise ConfigError(
                    f"{folder} is a link to {os.readlink(folder)}, which does not exist",
                    where=f"{where}: {path}",
                    fix="choose another",
                ) from None
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                continue
            raise ConfigError(
                error.strerror or str(error), where=f"{where}: {display_path(path)}", fix="choose another"
            ) from None
        if not stat.S_ISDIR(mode):
            what = "is" if folder == path else f"{folder} is"
            raise ConfigError(
                f"{what} a file", where=f"{where}: {path}", expected="a folder", fix="choose another"
            )
        return folder
    return Path("/")


def _check_names(text: str, folder: Path, where: str) -> None:
    """Check the lengths of the names in a path against the limit of the file system of `folder`."""
    longest = NAME_BYTES
    with suppress(OSError, ValueError):
        longest = os.pathconf(folder, "PC_NAME_MAX")
    for part in Path(text).parts:
        size = len(os.fsencode(part))
        if size > longest and part != os.sep:
            raise ConfigError(
                f"has {size} bytes, but a file name takes at most {longest}",
                where=f"{where}: {display_path(part)}",
                fix="choose a shorter one",
            )


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder` has about `needed` bytes free. The folder need not exist.

    Raises DataError.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(
            f"disk has {free / 1e6:.3g} MB free, but about {needed / 1e6:.3g} MB are needed",
            where=folder,
            fix="free disk space or choose another output_path",
        )


@contextmanager
def explain_disk(path: Path) -> Iterator[Path]:
    """Convert an OSError in the block to a one-line DataError about `path`."""
    try:
        yield path
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        raise DataError(problem, where=path, fix="free disk space or choose another output_path") from None
