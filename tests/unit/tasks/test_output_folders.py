"""Generation's and extraction's output.

Names and folders checked first, one run a folder, killed runs' files removed.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mindspeed_mm import locks
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import ConfigError, LaunchError
from mindspeed_mm.leftovers import temporary_name
from mindspeed_mm.locks import LOCK_FILE, Holder
from mindspeed_mm.process_ids import process_start
from mindspeed_mm.tasks import generate
from mindspeed_mm.tasks.jobs.extract import ExtractJob
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from tests.support.errors import raises


@pytest.fixture
def config(tmp_path, monkeypatch):
    """`config(key=value, …)` writes an inference JSON whose weights do not exist, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(**values):
        model = {"transformer": ["t.safetensors"], "vae": "vae.pth", "text_encoder": "t5.pth"}
        base = {"model": model, "prompt": "a cat", "output_path": "out"}
        path = tmp_path / "inference.json"
        path.write_text(json.dumps({**base, **values}))
        return str(path)

    return write


def weights(folder: Path) -> None:
    for name in ("t.safetensors", "vae.pth", "t5.pth"):
        (folder / name).touch()


def locked(folder: Path) -> Path:
    parent = os.getppid()
    folder.mkdir()
    holder = replace(Holder.this_process(), pid=parent, start=process_start(parent))
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return folder


def test_dry_run_without_weights_says_what_it_did_not_check(config, capsys):
    generate.main([config(), "--dry-run"])
    out = capsys.readouterr().out
    assert "not checked" in out
    assert all(
        name in out.splitlines()[-1] for name in ("t.safetensors", "vae.pth", "t5.pth", "--check-inputs")
    )
    for flags in ([], ["--dry-run", "--check-inputs"]):
        with raises(ConfigError, "model.vae", "vae.pth"):
            GenerateJob.from_argv([config(), *flags])


def test_strict_dry_run_passes_with_the_weights_there(config, tmp_path, capsys):
    weights(tmp_path)
    generate.main([config(), "--dry-run", "--check-inputs"])
    assert "not checked" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("name", "x" * 251, "251 bytes"),
        ("name", "猫" * 84, "252 bytes"),
        ("name", "a\nb", "control character"),
        ("prompt", "half \udcff", "surrogate"),
        ("negative_prompt", "half \udcff", "surrogate"),
    ],
)
def test_name_or_prompt_that_no_file_takes_is_rejected_first(config, key, value, fact):
    flag = f"--{key.replace('_', '-')}={value}"
    with raises(ConfigError, fact):
        GenerateJob.from_argv([config(), "--dry-run", flag])


def test_longest_name_is_taken(config, tmp_path):
    name = "x" * 250
    (tmp_path / f"{name}.json").touch()
    (tmp_path / temporary_name(f"{name}.json")).touch()
    GenerateJob.from_argv([config(name=name), "--dry-run"]).check_outputs()


def test_names_that_would_share_a_file_are_rejected(config):
    tasks = [{"name": "cat"}, {"name": "cat.mp4"}]
    with raises(ConfigError, "cat.mp4"):
        GenerateJob.from_argv([config(tasks=tasks), "--dry-run"])


@pytest.mark.parametrize("place", ["out", "out/video1", "out/video1.json/x"])
def test_path_that_blocks_a_video_is_named(config, tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with raises(ConfigError, "output_path"):
        GenerateJob.from_argv([config(), "--dry-run"]).check_outputs()


@pytest.mark.parametrize("place", ["latents.safetensors", "window_01/latents.safetensors"])
def test_folder_in_place_of_latents_is_named(config, tmp_path, place):
    (tmp_path / "out/video1" / place).mkdir(parents=True)
    long = {"num_frames": 29, "window": 17} if "window" in place else {}
    job = GenerateJob.from_argv([config(**long), "--dry-run"])
    with raises(ConfigError, "folder", "video1", place):
        job.check_outputs()


@pytest.mark.parametrize("target", ["/proc", "nowhere"])
def test_window_that_cannot_be_written_is_named(config, tmp_path, target):
    (tmp_path / "out/video1").mkdir(parents=True)
    (tmp_path / "out/video1/window_01").symlink_to(target)
    weights(tmp_path)
    job = GenerateJob.from_argv([config(num_frames=29, window=17), "--dry-run", "--check-inputs"])
    with raises(ConfigError, "window_01", "video1"):
        job.check_outputs()


def test_empty_output_path_is_rejected(config):
    with raises(ConfigError, where="output_path"):
        GenerateJob.from_argv([config(), "--output-path", "", "--dry-run"]).check_outputs()


def test_second_generation_into_one_folder_is_rejected(config, tmp_path, capsys):
    weights(tmp_path)
    locked(tmp_path / "out")
    for flags in ([], ["--dry-run", "--check-inputs"]):
        with pytest.raises(SystemExit) as stop:
            generate.main([config(), *flags])
        assert stop.value.code == 1
        assert f"process {os.getppid()} on" in capsys.readouterr().err


def test_start_removes_what_a_killed_generation_left(config, tmp_path, monkeypatch):
    weights(tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "out/video1").mkdir(parents=True)
    left = temporary_name("x.mp4").replace(f".{os.getpid()}-", f".{ended.pid}-")
    for folder in ("out", "out/video1"):
        (tmp_path / folder / left).touch()
        (tmp_path / folder / "kept.mp4").touch()
    seen: list[str] = []
    monkeypatch.setattr(Accelerator, "detect", lambda: SimpleNamespace(hint_slow_bf16=lambda *_: None))
    monkeypatch.setattr(
        "mindspeed_mm.tasks.generate_videos.run",
        lambda *_: seen.extend(
            sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "out").rglob("*"))
        ),
    )
    generate.main([config()])
    assert seen == [f"out/{LOCK_FILE}", "out/kept.mp4", "out/video1", "out/video1/kept.mp4"]
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def extraction(folder: Path, save_path: str) -> ExtractJob:
    data = {"dataset_param": {"dataset_type": "vace", "basic_parameters": {"data_path": "data.txt"}}}
    model = {"ae": {"from_pretrained": "vae.pth"}, "text_encoder": {"from_pretrained": "t5.pth"}}
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "model.json").write_text(json.dumps(model))
    files = [f"--mm-data={folder}/data.json", f"--mm-model={folder}/model.json"]
    return ExtractJob.from_argv([*files, f"--save-path={save_path}"])


@pytest.mark.parametrize("path", ["file", "file/features", "/proc/features", "x" * 256, "a\0b", ""])
def test_feature_folder_that_cannot_be_made_is_rejected(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with raises(ConfigError, "--save-path"):
        extraction(tmp_path, path).check_outputs()


def test_second_extraction_into_one_folder_is_rejected(tmp_path, monkeypatch):
    job = extraction(tmp_path, str(locked(tmp_path / "out")))
    with raises(LaunchError, os.getppid()):
        job.check_outputs()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(locks, "read_holder", None)
    job.check_outputs()  # the first rank reports it


def test_job_with_bytes_that_are_not_utf8_can_be_written(tmp_path):
    extraction(tmp_path, f"{tmp_path}/\udcff").to_json().encode()
