"""Habits that a reader cannot be trusted to see every time.

No print, no global, no machine's paths, no unsafe torch.load.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "mindspeed_mm",
    "checkpoint",
    "megatron",
    "pretrain_vace.py",
    "pretrain_sora.py",
    "examples",
    "benchmarks",
    "scripts",
)
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:work|root|home|Users)/[\w.-]+")
IN_GENERAL = ("/home/you", "/home/me")  # made-up paths in the documents
MAX_LINES = 350
LONG = {  # file → why it is read better in one place
    "mindspeed_mm/serve/app.py": "every route of the HTTP API, as its one table",
    "mindspeed_mm/tools/launch.py": "one run of several ranks, whose steps share what they watch",
}
CALLED_BY_TORCH = {"_policy", "compile_later"}  # their signatures are torch's business


def tracked(*suffixes: str) -> list[Path]:
    """Files of the checkout (those that git would commit), with one of the suffixes."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


@functools.cache
def trees() -> list[tuple[str, ast.Module]]:
    """Path and syntax tree of each module of the product."""
    relative = {str(path.relative_to(ROOT)): path for path in tracked(".py")}
    return [
        (where, ast.parse(path.read_text(encoding="utf-8")))
        for where, path in relative.items()
        if where.startswith(CODE)
    ]


@functools.cache
def calls(tree: ast.Module) -> list[tuple[ast.Call, str]]:
    return [(node, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_prints_and_nothing_is_global() -> None:
    found = []
    for where, tree in trees():
        found += [
            f"{where}:{node.lineno}: print; use mindspeed_mm.log"
            for node, name in calls(tree)
            if name == "print"
        ]
        found += [f"{where}:{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert not found, "\n" + "\n".join(found)


def test_torch_load_always_gets_weights_only() -> None:
    def safe(node: ast.Call) -> bool:
        return any(
            word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
            for word in node.keywords
        )

    found = [
        f"{where}:{node.lineno}: {ast.unparse(node)}"
        for where, tree in trees()
        for node, name in calls(tree)
        if name == "torch.load" and not safe(node)
    ]
    found += [
        f"{where}:{node.lineno}: pickle"
        for where, tree in trees()
        for node, name in calls(tree)
        if name in ("pickle.load", "pickle.loads", "eval", "exec")
    ]
    assert not found, "\n" + "\n".join(found)


def test_signatures_name_their_inputs() -> None:
    """No `**kwargs` of ours; a ParamSpec's is a decorator's business."""
    found = [
        f"{where}:{node.lineno}: {node.name}(**{node.args.kwarg.arg})"
        for where, tree in trees()
        if not where.startswith("benchmarks")
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.kwarg
        if node.name not in CALLED_BY_TORCH
        if not ast.unparse(node.args.kwarg.annotation or ast.Constant("")).endswith(".kwargs")
    ]
    assert not found, "\n" + "\n".join(found)


def test_long_files_have_a_reason() -> None:
    """Of the library. A reason that is not needed any more is an error, too."""
    sizes = {
        where: len((ROOT / where).read_text(encoding="utf-8").splitlines())
        for where, _ in trees()
        if where.startswith(("mindspeed_mm/", "checkpoint/", "megatron/"))
    }
    assert {where for where, lines in sizes.items() if lines > MAX_LINES} == set(LONG)


def test_only_geometry_computes_with_the_sizes_of_latents() -> None:
    """Frames to latent frames, 4k+1, and whole tokens: elsewhere these go by LatentGeometry."""
    formula = re.compile(
        r"[+-] [13]\) (?://|%|/) 4\b|// 4 \* 4 \+ 1|% 4 [!=]= 1|(?://|%) 16\b|(?:height|width) // 8\b"
    )
    found = [
        f"{where}:{number}: {line.strip()}"
        for where, _ in trees()
        if where.startswith("mindspeed_mm/") and where != "mindspeed_mm/geometry.py"
        for number, line in enumerate((ROOT / where).read_text(encoding="utf-8").splitlines(), 1)
        if formula.search(line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_product_names_no_path_of_one_machine() -> None:
    found = []
    for path in tracked(".py", ".sh", ".json", ".yaml", ".toml", ".md", ".txt", ".cfg"):
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            hits = [hit for hit in MACHINE_PATH.findall(line) if not hit.startswith(IN_GENERAL)]
            found += [f"{path.relative_to(ROOT)}:{number}: {hit}" for hit in hits]
    assert not found, "\n" + "\n".join(found)


def test_every_script_fails_loudly_and_parses() -> None:
    found = []
    for path in tracked(".sh"):
        text = path.read_text(encoding="utf-8")
        sourced = not text.startswith("#!")  # a file meant to be sourced runs under its caller's settings
        if not sourced and "set -euo pipefail" not in text:
            found.append(f"{path.relative_to(ROOT)}: no `set -euo pipefail`")
        checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        found += [checked.stderr] if checked.returncode else []
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "command", [["check", "--no-cache"], ["format", "--check", "--no-cache"]], ids=["check", "format"]
)
def test_ruff_passes(command: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr


@pytest.mark.slow
def test_mypy_passes() -> None:
    ran = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr
