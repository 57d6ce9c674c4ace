"""A module imports only from floors below (docs/concepts/architecture.md).

Read with ast, nothing is imported.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ROOT / "mindspeed_mm/__init__.py"  # names of all floors, imported when they are used
SIBLINGS = {
    "models",
    "data",
    "distributed",
    "training",
    "generation",
    "planning",
    "evaluation",
}  # on their floor none imports another
FLOORS = {
    "errors": 0, "checksum": 0, "files": 0, "registry": 0, "log": 0, "locks": 0,
    "processes": 0, "progress": 0, "outputs": 0, "geometry": 0, "limits": 0,
    "leftovers": 0, "process_ids": 0, "imports": 0, "safetensors_header": 0, "text_encoding": 0,
    "config": 1,
    "accelerator": 2, "ops": 2, "flow": 2,
    "models": 3, "data": 3, "distributed": 3,
    "conditioning": 4,
    "training": 5, "generation": 5, "planning": 5, "evaluation": 5,
    "tasks": 6, "tools": 6,
    "serve": 7, "ui": 7,
    "cli": 8,
}  # fmt: skip


def floor(module: str) -> float | None:
    """The floor of one of our modules; None for anybody else's."""
    parts = module.split(".")
    if parts[0] in ("checkpoint", "pretrain_vace", "pretrain_sora"):
        return 8
    if parts[:2] == ["megatron", "mm"]:
        return 2.5  # beside floor 3: it may use floors 0-1 only, floors from 3 up may use it
    if parts[0] != "mindspeed_mm":
        return None
    if parts == ["mindspeed_mm"]:
        return 0
    if parts[-1].endswith("config") and len(parts) > 2:
        return 1
    return FLOORS[parts[1]] if len(parts) > 1 else 0


def may_import(importer: str, imported: str) -> bool:
    """Whether `importer` may import `imported` (both ours)."""
    low, high = floor(imported), floor(importer)
    assert low is not None
    assert high is not None
    if high == 2.5:
        return low <= 1 or low == 2.5
    if low != high or low == 1:
        return low <= high
    rooms = [name.split(".")[1] if "." in name else name for name in (importer, imported)]
    return rooms[0] == rooms[1] or not SIBLINGS & set(rooms)


def imports(source: str) -> list[tuple[int, str, int]]:
    """(line, module, level) of every import statement; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or "", node.level))
            found += [
                (node.lineno, f"{node.module}.{alias.name}", node.level)
                for alias in node.names
                if is_module(f"{node.module}.{alias.name}")
            ]
    return found


def references(source: str) -> list[tuple[int, str]]:
    """(line, module) of every string such as "mindspeed_mm.models.wan.vace:VaceTransformer"."""
    named = re.compile(r"((?:mindspeed_mm|checkpoint|megatron\.mm)(?:\.\w+)+):\w+")
    return [
        (node.lineno, match[1])
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (match := named.fullmatch(node.value))
    ]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def violations(module: str, source: str, where: str) -> list[str]:
    found = []
    for line, imported, level in imports(source):
        if level:
            found.append(f"{where}:{line}: relative import of {imported or '.'}; imports are absolute")
        elif floor(imported) is not None and not may_import(module, imported):
            found.append(
                f"{where}:{line}: floor {floor(module)} imports {imported} of floor {floor(imported)}"
            )
    # a config may name what is built from it later, on its own room's floor
    room = FLOORS.get(module.split(".")[1], floor(module)) if "." in module else floor(module)
    for line, named in references(source):
        if (low := floor(named)) is not None and room is not None and low > room:
            found.append(f"{where}:{line}: floor {room} names {named} of floor {low}")
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path: Path) -> set[str]:
    """The names that other modules can import from a file."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def our_files() -> list[Path]:
    folders = [ROOT / "mindspeed_mm", ROOT / "checkpoint", ROOT / "megatron"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_every_module_imports_only_from_floors_below() -> None:
    found = []
    for path in our_files():
        relative = path.relative_to(ROOT)
        if path == PUBLIC:
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        found += violations(module, path.read_text(encoding="utf-8"), str(relative))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mindspeed_mm.models.wan.vace", "from mindspeed_mm.data.sample import Batch"),
        ("mindspeed_mm.flow.matching", "import mindspeed_mm.training.trainer"),
        ("mindspeed_mm.errors", "from mindspeed_mm.config.schema import Config"),
        ("mindspeed_mm.data.config", "from mindspeed_mm.data.sample import Batch"),
        ("mindspeed_mm.training.trainer", "from mindspeed_mm.generation import pipeline"),
        ("mindspeed_mm.tasks.pretrain", "from checkpoint.vace import VACE"),
        ("megatron.mm.groups", "from mindspeed_mm.accelerator import Accelerator"),
        ("mindspeed_mm.models.spec", "from .keymap import KeyMap"),
        ("mindspeed_mm.models.spec", 'cost = "mindspeed_mm.training.trainer:train"'),
    ],
)
def test_forbidden_import_is_named_with_its_line(module: str, source: str) -> None:
    assert violations(module, "\n" + source, "file.py")[0].startswith("file.py:2: ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mindspeed_mm.models.wan.vace", "from mindspeed_mm.models.keymap import KeyMap"),
        ("mindspeed_mm.training.trainer", "from mindspeed_mm.data.sample import Batch"),
        ("mindspeed_mm.distributed.mesh", "from megatron.mm.groups import Groups"),
        ("mindspeed_mm.config.schema", "from mindspeed_mm.errors import ConfigError"),
        ("megatron.mm.groups", "import megatron.core"),
        ("mindspeed_mm.models.transforms.config", 'build = "mindspeed_mm.models.transforms.lora:build_lora"'),
    ],
)
def test_import_downwards_is_allowed(module: str, source: str) -> None:
    assert violations(module, source, "file.py") == []


def test_every_imported_name_exists() -> None:
    """An import within a function, or in a test that seldom runs, is found here."""
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in our_files()}
    names = {module: defined(path) for module, path in known.items() if path.name != "__init__.py"}
    folders = (ROOT / "tests", ROOT / "benchmarks", ROOT / "examples", ROOT / "scripts")
    found = []
    for path in [*our_files(), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ImportFrom) or node.module is None or node.level:
                continue
            if node.module in names:
                missing = {alias.name for alias in node.names} - names[node.module]
            elif node.module.startswith(("mindspeed_mm.", "checkpoint.", "megatron.mm")):
                missing = {alias.name for alias in node.names if not is_module(f"{node.module}.{alias.name}")}
            else:
                continue
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: no {name} in {node.module}" for name in missing
            ]
    assert not found, "\n" + "\n".join(found)


def package(module: str) -> str:
    """`training` of mindspeed_mm.training.step; modules at the top are no package."""
    first, *rest = module.split(".")
    if first == "megatron":
        return "megatron.mm"
    return first if first != "mindspeed_mm" else rest[0] if len(rest) > 1 else ""


def test_no_two_packages_import_each_other() -> None:
    """Schemas (`*config.py`) do not count: they import nothing but schemas."""
    found: dict[tuple[str, str], str] = {}
    for path in our_files():
        if path == PUBLIC:
            continue
        importer = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(tree_of(path)):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if floor(name) in (None, 1) or name.startswith("megatron.core"):
                    continue
                ends = package(importer), package(name)
                if all(ends) and ends[0] != ends[1]:
                    found.setdefault(ends, f"{importer}:{node.lineno} imports {name}")
    assert not [
        f"{line}; {found[end, start]}"
        for (start, end), line in found.items()
        if start < end and (end, start) in found
    ]


def test_every_folder_has_a_floor() -> None:
    rooms = {
        path.relative_to(ROOT / "mindspeed_mm").parts[0]
        for path in our_files()
        if "mindspeed_mm" in path.parts
    }
    assert {room.removesuffix(".py") for room in rooms} - {"__init__"} == set(FLOORS)


def test_package_inits_are_empty() -> None:
    full = [
        str(path.relative_to(ROOT))
        for path in our_files()
        if path.name == "__init__.py" and path != PUBLIC and path.read_text().strip()
    ]
    assert not full, f"an __init__ that imports makes --help slow: {full}"


def test_megatron_stays_a_namespace() -> None:
    assert not (ROOT / "megatron" / "__init__.py").exists()
    assert not [
        path.name for path in (ROOT / "megatron").iterdir() if path.name in ("core", "training", "legacy")
    ]
