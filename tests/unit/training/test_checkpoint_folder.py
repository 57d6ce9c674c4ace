"""Which checkpoint --load means, and when a run may start at iteration 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.training.checkpoint_folder import check_save_folder, folder_to_load
from mindspeed_mm.training.config import CheckpointConfig
from tests.support.errors import raises

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Complete checkpoints of 70 and 80, an unfinished one of 90, a tracker that names 80."""
    for number in (70, 80, 90):
        folder = tmp_path / f"iter_{number:07d}"
        folder.mkdir()
        (folder / "__0_0.distcp").touch()
        if number < 90:
            (folder / ".metadata").touch()
    (tmp_path / TRACKER).write_text("80\n")
    return tmp_path


def config(root: Path, **changes: object) -> CheckpointConfig:
    return CheckpointConfig.model_validate({"load": str(root), "save": str(root), **changes})


def test_load_takes_the_trackers_iteration_or_the_named_one(saved: Path) -> None:
    assert folder_to_load(config(saved)) == saved / "iter_0000080"
    assert folder_to_load(config(saved, ckpt_step=70)) == saved / "iter_0000070"
    assert folder_to_load(config(saved / "iter_0000070")) == saved / "iter_0000070"


def test_load_without_tracker_next_to_checkpoints_is_rejected(saved: Path) -> None:
    (saved / TRACKER).unlink()
    with raises(
        WeightsError,
        TRACKER,
        70,
        80,
        "--ckpt-step 80",
        "ignore-existing-checkpoints",
        where=f"--load {saved}",
    ) as caught:
        folder_to_load(config(saved))
    assert "90" not in str(caught.value).replace(str(saved), "")
    assert folder_to_load(config(saved, ckpt_step=70)) == saved / "iter_0000070"


def test_ignore_existing_checkpoints_starts_over(saved: Path) -> None:
    assert folder_to_load(config(saved, ignore_existing_checkpoints=True)) is None
    (saved / TRACKER).unlink()
    assert folder_to_load(config(saved, ignore_existing_checkpoints=True)) is None


def test_incomplete_checkpoint_is_not_among_the_complete_ones(saved: Path) -> None:
    (saved / "iter_0000080/.metadata").unlink()
    with raises(WeightsError, "iter_0000080", ".metadata", 70):
        folder_to_load(config(saved))
    with raises(WeightsError, "iter_0000003", 70):
        folder_to_load(config(saved, ckpt_step=3))


def test_empty_folder_starts_at_zero_only_as_the_save_folder(tmp_path: Path) -> None:
    assert folder_to_load(config(tmp_path)) is None
    nothing = tmp_path / "nothing"
    for refused in (
        config(tmp_path, save=None),
        config(tmp_path, exit_on_missing_checkpoint=True),
        config(nothing, save=None),
    ):
        with raises(WeightsError, TRACKER, where=f"--load {refused.load}"):
            folder_to_load(refused)


@pytest.mark.parametrize("load", [None, "elsewhere"])
def test_save_into_checkpoints_of_another_run_is_rejected(saved: Path, load: str | None) -> None:
    with raises(WeightsError, 70, 80, f"--load {saved}", where=f"--save {saved}") as caught:
        check_save_folder(config(saved, load=load))
    assert "90" not in str(caught.value).replace(str(saved), "")
    check_save_folder(config(saved, load=load, ignore_existing_checkpoints=True))


def test_save_where_the_run_resumes_or_begins_is_allowed(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    for load in (saved, tmp_path / "link", saved / "iter_0000070"):
        check_save_folder(config(saved, load=str(load)))
        with raises(WeightsError, 70, 80, "--finetune", where=f"--save {saved}"):
            check_save_folder(config(saved, load=str(load), finetune=True))
    for fresh in (tmp_path / "new", tmp_path / "iter_0000090", None):
        check_save_folder(config(saved, save=fresh and str(fresh)))
