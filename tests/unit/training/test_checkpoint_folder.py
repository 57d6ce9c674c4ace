"""Which checkpoint --load means, and when a run may start at iteration 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.training.checkpoint_folder import folder_to_load
from mindspeed_mm.training.config import CheckpointConfig

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


def test_load_without_tracker_beside_checkpoints_is_refused(saved: Path) -> None:
    (saved / TRACKER).unlink()
    with pytest.raises(WeightsError) as caught:
        folder_to_load(config(saved))
    for fact in (TRACKER, "70, 80", "--ckpt-step 80", "--ignore-existing-checkpoints"):
        assert fact in str(caught.value)
    assert "90" not in str(caught.value)
    assert folder_to_load(config(saved, ckpt_step=70)) == saved / "iter_0000070"


def test_ignore_existing_checkpoints_starts_over(saved: Path) -> None:
    assert folder_to_load(config(saved, ignore_existing_checkpoints=True)) is None
    (saved / TRACKER).unlink()
    assert folder_to_load(config(saved, ignore_existing_checkpoints=True)) is None


def test_an_incomplete_checkpoint_is_not_among_the_complete_ones(saved: Path) -> None:
    (saved / "iter_0000080/.metadata").unlink()
    with pytest.raises(WeightsError, match=r"iter_0000080 has no .metadata.*complete checkpoints: 70;"):
        folder_to_load(config(saved))
    with pytest.raises(WeightsError, match=r"iter_0000003 does not exist.*complete checkpoints: 70;"):
        folder_to_load(config(saved, ckpt_step=3))


def test_an_empty_folder_starts_at_zero_only_as_the_save_folder(tmp_path: Path) -> None:
    assert folder_to_load(config(tmp_path)) is None
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        folder_to_load(config(tmp_path, save=None))
    with pytest.raises(WeightsError, match="holds no checkpoint"):
        folder_to_load(config(tmp_path, exit_on_missing_checkpoint=True))
    with pytest.raises(WeightsError, match="no such folder"):
        folder_to_load(config(tmp_path / "nothing", save=None))
