"""`import mindspeed_mm`: every public name, and nothing heavy before it is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mindspeed_mm
from mindspeed_mm.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mindspeed_mm"


def test_import_of_the_package_loads_nothing_heavy() -> None:
    code = "import sys, mindspeed_mm; sys.exit(bool({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", mindspeed_mm.__all__)
def test_public_names_match_their_modules(name: str) -> None:
    found = getattr(mindspeed_mm, name)
    assert name in dir(mindspeed_mm)
    home = mindspeed_mm._HOMES[name]
    assert found is (getattr(sys.modules[home], name) if home else sys.modules[f"mindspeed_mm.{name}"])


def test_public_list_table_and_type_imports_agree() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    names = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(names) == sorted(mindspeed_mm.__all__) == sorted(mindspeed_mm._HOMES)


def test_public_list_holds_every_registry() -> None:
    made = re.compile(r"^(\w+): Registry\[", re.MULTILINE)
    names = {name for path in PACKAGE.rglob("*.py") for name in made.findall(path.read_text())}
    assert names
    assert names <= set(mindspeed_mm.__all__)
    assert all(isinstance(getattr(mindspeed_mm, name), Registry) for name in names)


def test_public_list_holds_what_the_python_page_imports() -> None:
    page = (ROOT / "docs/reference/python.md").read_text()
    lines = re.findall(r"^from mindspeed_mm import (.+)$", page, re.MULTILINE)
    assert lines
    assert {name.strip() for line in lines for name in line.split(",")} <= set(mindspeed_mm.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'VacePipline'"):
        mindspeed_mm.VacePipline  # noqa: B018


def test_types_are_installed_with_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert '"mindspeed_mm": ["py.typed"]' in (ROOT / "setup.py").read_text()
