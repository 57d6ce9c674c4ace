"""The wheel in an empty folder, outside of any checkout: commands, a project, a check of its training, a video."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mindspeed_mm.data.video import open_video

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, as pip unpacks it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # a copy: setuptools leaves build folders beside setup.py
    subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=(folder / "files").open("wb"))
    for name in (folder / "files").read_text().split("\0"):
        if name and not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, with the wheel's code in place of the checkout's."""
    names = ("PATH", "HOME", "LANG", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {
        "PYTHONPATH": str(site),
        "MINDSPEED_MM_DEVICE": "cpu",
        "NPUS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def vace(*words: str) -> list[str]:
    return [sys.executable, "-m", "mindspeed_mm.cli", *words]


def test_wheel_holds_code_scripts_and_weights_but_no_tests(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*")}
    assert "mindspeed_mm/starter/14B/pretrain_fsdp.sh" in names
    assert "mindspeed_mm/starter/tiny/weights/Wan2.1_VAE.pth" in names
    assert "megatron/mm/arguments.py" in names
    assert "megatron/__init__.py" not in names  # megatron-core's
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def test_wheels_code_is_used_and_not_the_checkouts(installed: Path, tmp_path: Path) -> None:
    code = "import mindspeed_mm; print(mindspeed_mm.__file__)"
    assert run(installed, tmp_path, sys.executable, "-c", code).stdout.startswith(str(installed))


@pytest.mark.parametrize("script", ["1.3B/pretrain_fsdp.sh", "14B/pretrain_fsdp.sh", "14B/pretrain_lora.sh"])
def test_training_scripts_of_a_project_check_their_job(installed: Path, tmp_path: Path, script: str) -> None:
    run(installed, tmp_path, *vace("init", "project"))
    done = run(installed, tmp_path / "project", "bash", f"examples/vace/{script}", "--dry-run")
    assert "batch" in done.stdout


def test_project_with_tiny_weights_makes_a_video(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, *vace("init", "project", "--model", "tiny"))
    project = tmp_path / "project"
    words = [
        "examples/vace/tiny/inference.json",
        "--prompt",
        "a ball",
        "--steps",
        "2",
        "--output-path",
        "out",
    ]
    run(installed, project, *vace("generate", *words))
    assert open_video(project / "out/video1.mp4").num_frames == 17
