"""Registers the tasks of this package on import. Other packages register theirs through an entry point."""

from __future__ import annotations

from mindspeed_mm.conditioning.tasks import (  # noqa: F401 (each registers its tasks)
    compose,
    control,
    extension,
    inpaint,
    layout,
    outpaint,
    reference,
    synthetic,
)
from mindspeed_mm.conditioning.tasks.spec import TASKS, Task

__all__ = ["TASKS", "all_tasks"]

for _name in ("animate", "expand", "move", "reference", "swap"):
    TASKS.alias(_name, f"{_name}_anything")


def all_tasks() -> list[Task]:
    """Return all tasks, sorted by name."""
    return [TASKS.get(name) for name in TASKS]
