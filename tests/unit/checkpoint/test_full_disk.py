"""A disk that is full, or fills up while a checkpoint is written, is one line; the target stays as it was."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint.cli import main
from mindspeed_mm.models.weights import open_weights
from tests.support.errors import names
from tests.support.tiny import TEXT_FILE, VAE_FILE, tiny_transformer, write_official, write_transformer

pytestmark = pytest.mark.medium

TARGETS = {
    "mm": ("hf_to_mm", "official"),
    "folder": ("mm_to_hf", "mm_source"),
    "diffusers": ("mm_to_hf_diffusers", "mm_source"),
    "x.pt": ("mm_to_hf", "mm_source"),
    "x.safetensors": ("mm_to_hf", "mm_source"),
    "stages": ("resplit", "mm_source"),
    "pipeline": ("assemble_pipeline", ""),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official folder, the same weights as an MM folder, and other weights that stand in each target."""
    folder = tmp_path_factory.mktemp("disk")
    write_official(folder / "official")
    main(["VACEConverter", "hf_to_mm", *settings(folder / "official", folder / "mm_source")])
    return folder


@pytest.fixture
def files_end_at_100_kb() -> Iterator[None]:
    """What a full disk does to a writer, without filling one: write() fails with an errno.

    Readers are not touched.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def settings(source: Path, target: Path) -> list[str]:
    return ["--cfg.source_path", str(source), "--cfg.target_path", str(target)]


def argv(home: Path, name: str, target: Path) -> list[str]:
    method, source = TARGETS[name]
    if method != "assemble_pipeline":
        return ["VACEConverter", method, *settings(home / source, target)]
    official = home / "official"
    parts = {
        "high": official,
        "low": home / "mm_source",
        "vae": official / VAE_FILE,
        "text_encoder": official / TEXT_FILE,
    }
    flags = [word for part, path in parts.items() for word in (f"--cfg.{part}_path", str(path))]
    return ["VACEConverter", method, *flags, "--cfg.target_path", str(target)]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("name", TARGETS)
def test_full_disk_keeps_the_old_target(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, request: pytest.FixtureRequest
) -> None:
    target = tmp_path / name
    main(argv(home, name, target))
    before = listing(tmp_path)
    request.getfixturevalue("files_end_at_100_kb")
    error = error_of(argv(home, name, target), capsys)
    assert error.startswith(f"WeightsError: {target}: ")
    assert names(error, "written", "free space", "target_path")
    assert listing(tmp_path) == before
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", TARGETS)
def test_too_little_space_is_reported_before_anything_is_written(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4, 4))
    error = error_of(argv(home, name, tmp_path / "new" / name), capsys)
    assert error.startswith(f"WeightsError: {tmp_path / 'new'}")
    assert re.search(r"\b[\d.]+ [kM]B\b.*\b4 B\b", error)
    assert "target_path" in error
    assert not list(tmp_path.iterdir())


def test_empty_path_is_not_the_working_directory(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--cfg.target_path "$UNSET"` gives it."""
    write_transformer(tmp_path, tiny_transformer(), torch.float32)
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert "target_path" in error_of(
        ["VACEConverter", "hf_to_mm", "--cfg.source_path", ".", "--cfg.target_path", ""], capsys
    )
    assert "source_path" in error_of(
        ["VACEConverter", "hf_to_mm", "--cfg.source_path", "", "--cfg.target_path", "x"], capsys
    )
    assert listing(tmp_path) == before
    assert open_weights(".").has_branch
