"""Training's output folders.

Checked before the start, locked while it runs, cleared of what killed runs left.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron.mm.layout import REPLACED, WRITING
from mindspeed_mm.errors import ConfigError, LaunchError, WeightsError
from mindspeed_mm.locks import LOCK_FILE, Holder
from mindspeed_mm.process_ids import process_start
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.pretrain import hold_folder, main
from tests.support.errors import raises

ROOT = Path(__file__).resolve().parents[3]
SIZE = ROOT / "examples/vace/1.3B"


def argv(*more: str) -> list[str]:
    return [
        f"--mm-model={SIZE}/pretrain_model.json",
        f"--mm-data={SIZE}/feature_data.json",
        "--lr=1e-5",
        "--train-iters=2",
        f"--fsdp2-config-path={ROOT}/examples/vace/fsdp2_config.yaml",
        "--bf16",
        *more,
    ]


def locked(folder: Path) -> Path:
    parent = os.getppid()
    folder.mkdir()
    holder = replace(
        Holder.this_process(), pid=parent, start=process_start(parent), command="pretrain_vace.py --save x"
    )
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return folder


@pytest.mark.parametrize("flag", ["--save", "--tensorboard-dir"])
@pytest.mark.parametrize("path", ["file", "file/save", "x" * 256, "a\0b", ""])
def test_output_that_cannot_be_made_is_rejected_in_a_dry_run(tmp_path, monkeypatch, flag, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with raises(ConfigError, flag):
        PretrainJob.from_argv(argv(f"{flag}={path}", "--dry-run"), ranks=1).check_outputs()


def test_plain_dry_run_says_what_it_leaves_open(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(argv("--save=/proc/save", "--dry-run"))
    assert "--check-inputs" in capsys.readouterr().out
    with raises(ConfigError, "--save", "/proc/save"):
        PretrainJob.from_argv(
            argv("--save=/proc/save", "--dry-run", "--check-inputs"), ranks=1
        ).check_outputs()


def test_folder_of_another_training_is_rejected_early_and_late(tmp_path):
    job = PretrainJob.from_argv(argv(f"--save={locked(tmp_path / 'save')}"), ranks=1)
    with raises(LaunchError, os.getppid()):
        job.check_outputs()
    with raises(LaunchError, "--save"), hold_folder(job):
        pass


def test_run_that_would_overwrite_checkpoints_is_rejected_early(tmp_path):
    folder = tmp_path / "save/iter_0000070"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    save = f"--save={folder.parent}"
    with raises(WeightsError, 70, where=f"--save {folder.parent}"):
        PretrainJob.from_argv(argv(save), ranks=1).check_outputs()
    for more in ("--ignore-existing-checkpoints", f"--load={folder.parent}"):
        PretrainJob.from_argv(argv(save, more), ranks=1).check_outputs()


def test_reading_a_folder_in_use_is_not_blocked(tmp_path):
    folder = locked(tmp_path / "save")
    job = PretrainJob.from_argv(argv(f"--save={tmp_path / 'new'}", f"--load={folder}"), ranks=1)
    job.check_outputs()
    with hold_folder(job):
        assert (tmp_path / "new" / LOCK_FILE).exists()


def test_start_clears_what_a_killed_run_left(tmp_path, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"{REPLACED}iter_0000002").mkdir()
    (tmp_path / f"{REPLACED}iter_0000002/.metadata").touch()
    (tmp_path / f"{WRITING}iter_0000002").mkdir()
    (tmp_path / f"{WRITING}iter_0000002/__0_0.distcp").touch()
    (tmp_path / f".latest_checkpointed_iteration.txt.{ended.pid}").touch()
    (tmp_path / "mine").touch()
    with hold_folder(PretrainJob.from_argv(argv(f"--save={tmp_path}"), ranks=1)):
        assert sorted(os.listdir(tmp_path)) == [LOCK_FILE, "iter_0000002", "job.json", "mine"]
