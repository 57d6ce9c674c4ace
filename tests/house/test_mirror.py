"""tests/unit mirrors the library: a folder for each package, and each test in the folder of what it tests."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "tests" / "unit"
PACKAGES = {"checkpoint": "checkpoint", "megatron_mm": "megatron.mm"}  # the others are of mindspeed_mm
# Tests that import nothing of their package, and how they reach it.
INDIRECT = {
    "checkpoint/test_convert_big.py": "mm-convert in a process, whose memory is measured",
    "megatron_mm/test_help_text.py": "--help of the commands",
    "models/test_weights_names_page.py": "python -m mindspeed_mm.models.wan.state_dict",
    "planning/test_memory_truth.py": "tests/support/planned.py",
    "serve/test_app.py": "tests/support/server.py",
    "tasks/test_prepare.py": "vace prepare",
    "tasks/test_prepare_every_task.py": "vace prepare",
}


def package_of(folder: Path) -> str:
    """The package that a folder of tests/unit mirrors."""
    first, *rest = folder.relative_to(UNIT).parts
    return ".".join([PACKAGES.get(first, f"mindspeed_mm.{first}"), *rest])


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def unit_tests() -> list[Path]:
    return [path for path in sorted(UNIT.rglob("test_*.py")) if path.parent != UNIT]


def test_every_folder_of_unit_tests_mirrors_a_package() -> None:
    folders = {path.parent for path in unit_tests()}
    assert folders
    for folder in folders:
        assert (ROOT / package_of(folder).replace(".", "/")).is_dir(), folder


def test_every_unit_test_imports_the_package_it_is_filed_under() -> None:
    strays = set()
    for path in unit_tests():
        package = package_of(path.parent)
        if not any(name == package or name.startswith(f"{package}.") for name in imported(path)):
            strays.add(str(path.relative_to(UNIT)))
    assert strays == set(INDIRECT)


def test_top_level_unit_tests_match_a_module() -> None:
    names = {path.stem.removeprefix("test_") for path in UNIT.glob("test_*.py")}
    modules = {path.stem for path in (ROOT / "mindspeed_mm").glob("*.py")}
    assert names - modules == {"public_names"}  # of __init__.py
