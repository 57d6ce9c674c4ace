"""Megatron's checkpoint folders: the tracker file, `iter_0000010` or `release`, and `mp_rank_00[_ppp]` files.

Does not import torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import read_text, write_text
from mindspeed_mm.log import get_logger

logger = get_logger(__name__)
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
WEIGHTS_FILE = "model_optim_rng.pt"
WRITING = ".writing-"  # followed by iter_0000010: an incomplete checkpoint
REPLACED = f"{WRITING}replaced-"  # followed by iter_0000010: a complete checkpoint that is being replaced
_MAX_DIGITS = 18  # digits of an iteration
_ITERATION = re.compile(r"iter_(\d{7,18})")
_RANK = re.compile(r"mp_rank_(\d{2,3})(?:_(\d{3,}))?")


def read_tracker(root: Path) -> int | str | None:
    """Return the iteration in the tracker file, `"release"`, or None without a tracker file.

    Ignores surrounding white space, because `echo release >` writes a newline. Raises WeightsError for any
    other content.
    """
    tracker = root / TRACKER
    if not os.path.lexists(tracker):
        return None
    text = read_text(tracker, WeightsError, max_bytes=1 << 20).strip()
    if text == RELEASE:
        return RELEASE
    if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS:
        return int(text)
    raise WeightsError(f"got {text[:40]!r}", where=tracker, expected="an iteration number or 'release'")


def write_tracker(root: Path, iteration: int | str) -> None:
    """Write the tracker file atomically."""
    write_text(root / TRACKER, f"{iteration}\n")


def iteration_name(iteration: int | str) -> str:
    """Format 10 as `iter_0000010`, and `"release"` as `release`."""
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


def iteration_folder(root: Path, iteration: int | str) -> Path:
    """Return the folder of an iteration under `root`."""
    return root / iteration_name(iteration)


def parse_iteration(name: str) -> int | str | None:
    """Parse `iter_0000010` to 10, `release` to `"release"`, and any other name to None."""
    if name == RELEASE:
        return RELEASE
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def saved_iterations(root: Path) -> list[int]:
    """Return the iterations with a folder under `root`, in ascending order, without `release`."""
    found = (
        (parse_iteration(entry.name) for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else ()
    )
    return sorted(number for number in found if isinstance(number, int))


def restore_replaced(root: Path) -> None:
    """Restore the previous checkpoint if a save was killed while replacing it."""
    for replaced in root.glob(f"{REPLACED}*"):
        target = root / replaced.name.removeprefix(REPLACED)
        if not target.exists() and (replaced / ".metadata").is_file():
            replaced.rename(target)
            logger.warning(f"{target}: interrupted while overwriting; restored the previous checkpoint")


def is_half_written(path: Path) -> bool:
    """Return whether `path` is an incomplete checkpoint or tracker file of a killed run.

    The caller must hold the lock of the folder.
    """
    former = path.name.startswith(f".{TRACKER}.") and path.name.rpartition(".")[2].isdigit()
    return path.name.startswith(WRITING) or former


def complete_iterations(root: Path) -> list[int]:
    """Return the iterations under `root` whose save or conversion finished, in ascending order."""
    return [number for number in saved_iterations(root) if is_complete(iteration_folder(root, number))]


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a complete checkpoint.

    A checkpoint is complete if it has an index, which is written last, or the files of an MM checkpoint.
    """
    if (folder / ".metadata").is_file():
        return True
    return any(_RANK.fullmatch(entry.name) for entry in folder.iterdir()) if folder.is_dir() else False


def latest_folder(root: Path) -> Path | None:
    """Return the folder that the tracker file names, or None without a tracker file.

    Raises WeightsError if that folder does not exist.
    """
    iteration = read_tracker(root)
    if iteration is None:
        return None
    folder = iteration_folder(root, iteration)
    if not folder.is_dir():
        raise WeightsError(
            f"names {iteration}, but {folder} does not exist",
            where=root / TRACKER,
            fix="write an existing iteration into it",
        )
    return folder


def rank_name(stage: int | None) -> str:
    """Name the folder of a pipeline stage: None (no pipeline) → `mp_rank_00`; 2 → `mp_rank_00_002`."""
    return "mp_rank_00" if stage is None else f"mp_rank_00_{stage:03d}"


def parse_rank(name: str) -> int | None:
    """Parse `mp_rank_00_002` to pipeline stage 2, and any other name to None."""
    match = _RANK.fullmatch(name)
    return int(match[2]) if match and match[2] else None


def stage_files(folder: Path) -> list[Path]:
    """Return the weight files of one iteration folder in pipeline order, or [] if there are none.

    Raises WeightsError for a tensor-parallel checkpoint, a missing stage, or a rank without its file.
    """
    ranks: dict[tuple[int, int | None], Path] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _RANK.fullmatch(entry.name):
            ranks[int(match[1]), None if match[2] is None else int(match[2])] = entry
    if any(tensor_rank > 0 for tensor_rank, _ in ranks):
        raise WeightsError(
            "is split over tensor-parallel ranks",
            where=folder,
            fix="merge it to tensor-parallel size 1 first",
        )
    stages = [stage for _, stage in ranks]
    if None in stages and len(stages) > 1:
        raise WeightsError(
            "contains both mp_rank_00 and mp_rank_00_NNN", where=folder, fix="remove the outdated one"
        )
    numbers = sorted(stage for stage in stages if stage is not None)
    if numbers != list(range(len(numbers))):
        raise WeightsError(
            f"has pipeline stages {numbers}", where=folder, expected="stages 0, 1, 2, … without a gap"
        )
    files = [path / WEIGHTS_FILE for _, path in sorted(ranks.items(), key=lambda item: item[0][1] or 0)]
    for file in files:
        if not file.is_file():
            raise WeightsError("is missing", where=file, fix="convert again, or copy the whole checkpoint")
    return files
