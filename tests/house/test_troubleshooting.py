"""Troubleshooting names the same messages in both languages, and its commands work."""

from __future__ import annotations

import re
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
    "lies outside the dataset's folder",
    "holds CSV",
    "--preset mindspeed",
    "picture's size changes",
    "Git LFS pointer",
    "a link to",
]


def messages(page: Path) -> list[list[str]]:
    """The code in the first cell of each row."""
    cells = re.findall(r"^\| (.*?) \| .* \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [code for cell in cells if (code := re.findall(r"`[^`]+`", cell))]


def test_both_languages_list_the_same_messages() -> None:
    english, chinese = map(messages, PAGES)
    assert len(english) > 50
    assert english == chinese


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
