"""The last line of a training run: mean time per iteration, and samples per second."""

from __future__ import annotations

import re
from pathlib import Path

_TIME = re.compile(r"elapsed time per iteration[^:]*: *([0-9.]+)")


def elapsed_line(log: Path, global_batch_size: int, *, expected: bool = True) -> str:
    """Return the line, from the last 100 of the first 200 iteration times in the log.

    Without any, the line says so if `expected`, and is "" otherwise, because only one node logs them.
    """
    times = [float(found) for found in _TIME.findall(log.read_text(encoding="utf-8", errors="replace"))][:200]
    if not times:
        return f"no iteration was logged; see {log}" if expected else ""
    counted = times[-100:]
    mean = f"{sum(counted) / len(counted):.1f}"
    speed = global_batch_size * 1000 / float(mean) if float(mean) else 0.0
    return f"Elapsed Time Per iteration: {mean}, Average Samples per Second: {speed:.3f}"
