"""Names and shapes of the published files.

tests/data/published_layouts.json, where `{0-29}` stands for thirty blocks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

LAYOUTS = Path(__file__).parents[1] / "data" / "published_layouts.json"


def published_layout(model: str) -> dict[str, tuple[int, ...]]:
    """Map weight names to shapes of one published file."""
    layout: dict[str, tuple[int, ...]] = {}
    for name, shape in json.loads(LAYOUTS.read_text())[model].items():
        span = re.search(r"\{(\d+)-(\d+)\}", name)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else (None,)
        for number in numbers:
            layout[name if span is None else name.replace(span[0], str(number))] = tuple(shape)
    return layout
