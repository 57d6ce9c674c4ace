"""Troubleshooting names the same messages in both languages, and its commands work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [DOCS / "troubleshooting.md", DOCS / "zh" / "troubleshooting.md"]
REAL_FILES = [  # messages about files as people have them
    "brightest value is 1 of 255",
    "of 65535",
    "white nowhere",
    "white everywhere",
    "(I2V)",
    "cut off: its index ends",
    "is outside the dataset's folder",
    "contains CSV",
    "--preset mindspeed",
    "picture's size changes",
    "Git LFS pointer",
    "a link to",
    "the model reads the first",
    "nested more than",
    "Wan2.2-TI2V-5B",
    "byte order mark",
    "UTF-16",
    "tokens and are truncated",
    "predictor.text_len",
    "only a VACE module, without the trunk",
]

# What a message fills in: …, quoted and numbered parts, and the joints of its fields
FILLED = re.compile(r"…|'[^']*'|\S*\d\S*|: |; |, got |\(|\)|\bexpected\b|, ")
FOREIGN = (  # other programs' messages, and those that are put together word by word
    *("import torch", "MASTER_PORT=", "libhccl.so", "libascend_hal.so", "--tensorboard-dir"),
    *(
        "… contains neither tokenizer.json",
        "steps: got 4, but preset",
        "…distcp: expected … bytes",
        "iteration 7 skipped",
    ),
)


def messages(page: Path) -> list[list[str]]:
    """The code in the first cell of each row."""
    cells = re.findall(r"^\| (.*?) \| .* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [code for cell in cells if (code := re.findall(r"`[^`]+`", cell))]


def test_both_languages_list_the_same_messages() -> None:
    english, chinese = map(messages, PAGES)
    assert len(english) > 50
    assert english == chinese


def test_no_message_is_listed_twice() -> None:
    """A message that is reworded takes the place of the old one."""
    words = [
        " ".join(re.findall(r"[a-z_-]{2,}", code.lower())) for cell in messages(PAGES[0]) for code in cell
    ]
    assert not [text for text in set(words) if text and words.count(text) > 1]


@pytest.mark.parametrize("fragment", REAL_FILES)
def test_messages_about_files_are_explained(fragment: str) -> None:
    assert all(fragment in str(messages(page)) for page in PAGES)


def test_docs_install_nothing_that_no_index_has() -> None:
    """This package is on no index: an extra of it cannot be installed by name."""
    wrong = [
        page
        for page in DOCS.rglob("*.md")
        if re.search(r"pip install\s+['\"]?mindspeed-mm", page.read_text("utf-8"))
    ]
    assert not wrong


def literals(path: Path) -> Iterator[str]:
    """Every text of a module that is no docstring; what an f-string fills in is a mark."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


@cache
def said() -> str:
    """What the code can say, in one text."""
    root = DOCS.parent
    modules = [
        path
        for folder in ("mindspeed_mm", "checkpoint", "megatron")
        for path in (root / folder).rglob("*.py")
    ]
    scripts = [path.read_text(encoding="utf-8") for path in (root / "examples/vace").rglob("*.sh")]
    return " ".join(" ".join([*(text for path in modules for text in literals(path)), *scripts]).split())


def share_that_the_code_says(message: str) -> float:
    """How many of a message's pairs of neighbouring words are in the code; 1 where it has none."""
    parts = [part.strip(" ,.:;").split() for part in FILLED.split(message)]
    pairs = [" ".join(pair) for part in parts for pair in pairwise(part)]
    return sum(pair in said() for pair in pairs) / len(pairs) if pairs else 1


def test_messages_of_the_page_match_the_code() -> None:
    listed = [code.strip("`") for cell in messages(PAGES[0]) for code in cell]
    stale = [
        message
        for message in listed
        if not message.startswith(FOREIGN) and share_that_the_code_says(message) < 0.5
    ]
    assert not stale, "\n" + "\n".join(stale)


def test_unused_message_is_found() -> None:
    assert share_that_the_code_says("the moon is made of green cheese") < 0.5
