"""Parses command-line values that may be JSON."""

from __future__ import annotations

import json
from typing import Any

from mindspeed_mm.files import plain_problem


def parse_value(text: str) -> Any:
    """Parse JSON (`7`, `true`, `null`, `[1,2]`, `"7"`); return any other text unchanged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if plain_problem(value) else value
