"""The wheel in an empty folder outside any checkout: commands, a project, a training check, a video."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from mindspeed_mm.data.video import open_video

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy of the repository because setuptools leaves folders next to setup.py."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "source", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def environment(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment where pip installs the wheel built from the sdist; it shares our other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    words = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sdist)]
    subprocess.run([*pip, *words], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    # a path in a .pth file: its own .pth files, an editable install of the checkout among them, are not read
    (site_of(home) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = ["install", "--no-deps", "--ignore-installed", str(wheel)]
    subprocess.run([*pip, "--python", str(home / "bin/python"), *words], check=True, capture_output=True)
    return home


def site_of(home: Path) -> Path:
    (folder,) = home.glob("lib/python*/site-packages")
    return folder


def run(home: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, with that environment active."""
    names = ("PATH", "HOME", "LANG")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    variables |= {
        "VIRTUAL_ENV": str(home),
        "PATH": f"{home}/bin:{Path(sys.executable).parent}:{variables['PATH']}",
        "MINDSPEED_MM_DEVICE": "cpu",
        "NPUS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    program = [str(home / "bin" / command[0])] if command[0] in ("vace", "python") else [command[0]]
    done = subprocess.run(
        [*program, *command[1:]], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_sdist_holds_every_file_of_the_repository(tracked: list[str], sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not set(tracked) - held


def test_wheel_holds_code_scripts_and_weights_but_no_tests(environment: Path) -> None:
    names = {str(path.relative_to(site_of(environment))) for path in site_of(environment).rglob("*")}
    assert "mindspeed_mm/starter/14B/pretrain_fsdp.sh" in names
    assert "mindspeed_mm/starter/tiny/weights/Wan2.1_VAE.pth" in names
    assert "megatron/mm/arguments.py" in names
    assert "megatron/__init__.py" not in names  # megatron-core's
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def test_wheels_code_is_used_and_not_the_checkouts(environment: Path, tmp_path: Path) -> None:
    code = (
        "import mindspeed_mm, importlib.metadata as m; "
        "print(mindspeed_mm.__file__, m.version('mindspeed-mm-vace'))"
    )
    assert run(environment, tmp_path, "python", "-c", code).stdout.startswith(str(environment))


@pytest.fixture(scope="module")
def project(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of every size."""
    folder = tmp_path_factory.mktemp("project")
    run(environment, folder, "vace", "init", "project")
    return folder / "project"


@pytest.mark.parametrize("script", ["1.3B/pretrain_fsdp.sh", "14B/pretrain_fsdp.sh", "14B/pretrain_lora.sh"])
def test_training_scripts_of_a_project_check_their_job(environment: Path, project: Path, script: str) -> None:
    done = run(environment, project, "bash", f"examples/vace/{script}", "--dry-run")
    assert "batch" in done.stdout


def test_project_with_tiny_weights_makes_a_video(environment: Path, tmp_path: Path) -> None:
    run(environment, tmp_path, "vace", "init", "project", "--model", "tiny")
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
    run(environment, project, "vace", "generate", *words)
    assert open_video(project / "out/video1.mp4").num_frames == 17
