"""House rules of language.

Words that no page, message or name uses, and names of tests that fit in a line.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_NAME = 60
BANNED = re.compile(
    r"\b(strangers?|anew|aloud|whoever|(?:is|are) wanted|is there already|(?:un)?told|asked"
    r"|(?:lie|lies|lay) in|stands? in|(?:go|goes|going) on"
    r"|(?:that|which|what|it) (?:is|are) no (?!longer|more)\w+)\b",
    re.IGNORECASE,
)


def pages() -> list[Path]:
    """English pages; those in Chinese quote messages only."""
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), *ROOT.glob("*.md")]
    return sorted(path for path in found if "zh" not in path.parts and path.name != "README_zh.md")


def sources() -> list[Path]:
    folders = ("mindspeed_mm", "checkpoint", "megatron", "examples", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def scripts() -> list[Path]:
    return sorted([*(ROOT / "examples").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sh")])


@pytest.mark.parametrize(
    "path", [*pages(), *sources(), *scripts()], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_banned_word_is_used(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").replace("_", " ").splitlines()
    found = [
        f"{path.name}:{number}: {match[0]}"
        for number, line in enumerate(lines, 1)
        if (match := BANNED.search(line))
    ]
    assert not found, "\n" + "\n".join(found)


def test_names_of_tests_are_short() -> None:
    names = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > MAX_NAME
    ]
    assert not names, "\n" + "\n".join(names)


def test_names_of_tests_use_no_banned_word() -> None:
    names = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if BANNED.search(node.name.replace("_", " "))
    ]
    assert not names, "\n" + "\n".join(names)


@pytest.mark.parametrize(
    "text", ["that is no image", "cut it anew", "it is wanted", "def is_asked", "was told"]
)
def test_banned_word_is_found(text: str) -> None:
    assert BANNED.search(text.replace("_", " "))
