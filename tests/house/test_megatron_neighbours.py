"""Our package next to Megatron-LM's `megatron/training` and MindSpeed's adaptor, using stand-in packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.errors import names

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]
# What MindSpeed's adaptor does on import, as far as it matters: it looks for megatron.training, and patches
# it by name.
ADAPTOR = """
import sys
from importlib.util import find_spec
too_late = "megatron.core" in sys.modules
took = "core and training" if find_spec("megatron.training") else "core only"
sys.stdout.write(f"adaptor: {took}, {'after' if too_late else 'before'} megatron.core\\n")
"""
# The order of a training run: process group, then groups and mesh.
RUN = """
import sys
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.config import ParallelConfig
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.distributed.mesh import build_mesh
with launch(Accelerator.detect("cpu")) as accelerator:
    mesh = build_mesh(ParallelConfig(use_mindspeed=sys.argv[1] == "--use-mindspeed"), accelerator)
    sys.stdout.write(f"mesh of {mesh.world_size}\\n")
import megatron.core, megatron.mm
sys.stdout.write(f"ours: {megatron.mm.__path__[0]}\\n")
if "--training" in sys.argv:
    import megatron.training
    sys.stdout.write(f"training: {megatron.training.WHOSE}\\n")
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    (tmp_path / "mindspeed").mkdir()
    (tmp_path / "mindspeed" / "__init__.py").touch()
    (tmp_path / "mindspeed" / "megatron_adaptor.py").write_text(ADAPTOR)
    return tmp_path


def run(*argv: str, path: list[Path], cwd: Path) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    ran = subprocess.run(
        [sys.executable, "-c", RUN, *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_adaptor_is_imported_only_on_request(stand_ins: Path, tmp_path: Path) -> None:
    said = run("--plain", path=[ROOT, stand_ins], cwd=tmp_path)
    assert "adaptor" not in said
    assert "mesh of 1" in said


def test_mindspeed_is_imported_before_megatron_core(stand_ins: Path, tmp_path: Path) -> None:
    said = run("--use-mindspeed", path=[ROOT, stand_ins], cwd=tmp_path)
    assert said.startswith("adaptor: core only, before megatron.core\n")
    assert "mesh of 1" in said


def test_use_mindspeed_without_package_is_one_line(tmp_path: Path) -> None:
    if find_spec("mindspeed") is not None:
        pytest.skip("MindSpeed is installed here")
    from mindspeed_mm.errors import LaunchError

    source = "from megatron.mm.groups import import_mindspeed; import_mindspeed()"
    ran = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert f"{LaunchError.__name__}: --use-mindspeed" in ran.stderr
    assert names(ran.stderr, "install MindSpeed")


def test_megatron_lm_can_be_copied_over_a_checkout(stand_ins: Path, tmp_path: Path) -> None:
    """`cp -r Megatron-LM/megatron .` puts core and training next to mm and overwrites none of our files."""
    checkout = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "mindspeed_mm", checkout / "mindspeed_mm", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "megatron", checkout / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    core = find_spec("megatron.core")
    assert core is not None
    assert core.submodule_search_locations is not None
    theirs = tmp_path / "Megatron-LM" / "megatron"
    shutil.copytree(
        core.submodule_search_locations[0], theirs / "core", ignore=shutil.ignore_patterns("__pycache__")
    )
    (theirs / "training").mkdir()
    (theirs / "training" / "__init__.py").write_text("WHOSE = 'Megatron-LM'\n")
    ours = {path.relative_to(checkout) for path in checkout.rglob("*.py")}
    assert not {Path("megatron") / path.relative_to(theirs) for path in theirs.rglob("*.py")} & ours, (
        "a file is overwritten"
    )
    shutil.copytree(theirs, checkout / "megatron", dirs_exist_ok=True)

    said = run("--use-mindspeed", "--training", path=[checkout, stand_ins], cwd=tmp_path)
    assert "adaptor: core and training, before megatron.core" in said
    assert f"ours: {checkout / 'megatron' / 'mm'}" in said
    assert "training: Megatron-LM" in said
