"""docs/reference/names.md is what its script writes."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "docs/reference/make_names.py"


def test_page_of_names_is_current() -> None:
    written = SCRIPT.with_name("names.md").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(SCRIPT))["page"](), "run python docs/reference/make_names.py"
