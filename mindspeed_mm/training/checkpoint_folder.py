"""Selects the checkpoint that `--load` refers to.

A run never starts over in a folder with checkpoints that it could resume from, unless a flag requests it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from megatron.mm.layout import TRACKER, complete_iterations, is_complete, iteration_folder, read_tracker
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.files import read_json_object, write_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.training.config import CheckpointConfig

logger = get_logger(__name__)
BEST = "best.json"  # next to the tracker file; names the checkpoint with the lowest held-out loss


class Best(Config):
    """Content of best.json."""

    iteration: int = Field(gt=0)
    loss: float
    alone: bool = False  # saved only because of its loss


def read_best(root: Path) -> Best | None:
    """Return which checkpoint in `root` is the best.

    Returns None if there is no best.json or the checkpoint no longer exists. Raises WeightsError if best.json
    is invalid.
    """
    path = root / BEST
    if not path.is_file():
        return None
    try:
        found = parse(Best, read_json_object(path, WeightsError), str(path))
    except ConfigError as error:
        raise WeightsError(error.problem, where=path, fix="remove it") from None
    return found if is_complete(iteration_folder(root, found.iteration)) else None


def write_best(root: Path, best: Best) -> None:
    """Record the best checkpoint in best.json. Raises OSError."""
    write_json(root / BEST, best.model_dump(mode="json"))


def folder_to_load(config: CheckpointConfig) -> Path | None:
    """Return the checkpoint folder to load, or None to start at iteration 0.

    Raises WeightsError if the folder is missing or incomplete.
    """
    if config.load is None:
        return None
    root = Path(config.load)
    if config.ignore_existing_checkpoints:
        logger.warning(
            f"--load {root}: checkpoints not loaded: {_list(complete_iterations(root))}; starting at "
            "iteration 0"
        )
        return None
    if (root / ".metadata").is_file():
        return root
    found = config.ckpt_step or read_tracker(root)
    if found is None:
        _check_empty(root, config)
        return None
    folder = iteration_folder(root, found)
    if not is_complete(folder):
        problem = "has no .metadata, so its save was not finished" if folder.is_dir() else "does not exist"
        raise WeightsError(
            f"{folder.name} {problem}; complete checkpoints: {_list(complete_iterations(root))}",
            where=f"--load {root}",
            fix="choose one with --ckpt-step",
        )
    return folder


def check_save_folder(config: CheckpointConfig) -> None:
    """Check that this run will not overwrite checkpoints in --save that it does not resume from.

    Raises WeightsError.
    """
    if config.save is None or config.ignore_existing_checkpoints:
        return
    root = Path(config.save)
    loaded = None if config.load is None else Path(config.load).resolve()
    same = loaded is not None and root.resolve() in (loaded, loaded.parent)
    if same and not config.finetune:
        return
    if have := complete_iterations(root):
        starts = ", and --finetune starts at iteration 0" if config.finetune else ""
        ways = ["choose another folder", f"resume from this one with --load {root}"]
        if same:
            ways[1] = "remove --finetune to resume from them"
        if loaded is None:
            ways.append("or start over in it with --ignore-existing-checkpoints")
        raise WeightsError(
            f"holds complete checkpoints: {_list(have)}{starts}", where=f"--save {root}", fix=", ".join(ways)
        )


def _check_empty(root: Path, config: CheckpointConfig) -> None:
    """Check that a --load folder without a tracker file may be used to start at iteration 0.

    This is allowed if it is also the run's --save folder and contains no checkpoints yet. Raises
    WeightsError.
    """
    if have := complete_iterations(root):
        raise WeightsError(
            f"{TRACKER} is missing, but there are complete checkpoints: {_list(have)}",
            where=f"--load {root}",
            fix=(
                f"resume from one with --ckpt-step {have[-1]}, or start at iteration 0 with "
                "--ignore-existing-checkpoints"
            ),
        )
    same = config.save is not None and Path(config.save).resolve() == root.resolve()
    if not same or config.exit_on_missing_checkpoint:
        problem = "holds no checkpoint" if root.is_dir() else "no such folder"
        raise WeightsError(
            f"{problem} (no {TRACKER})",
            where=f"--load {root}",
            fix="name a folder of checkpoints, or remove --load",
        )
    logger.info(f"no checkpoint in {root} yet: starting at iteration 0")


def _list(iterations: Sequence[int]) -> str:
    """Format iterations as `70, 80`: the newest ten if there are more, `none` if there are none."""
    return ", ".join(["…"] * (len(iterations) > 10) + [str(number) for number in iterations[-10:]]) or "none"
