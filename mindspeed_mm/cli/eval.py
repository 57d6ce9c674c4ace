"""`vace eval`: scores of generated videos, and comparisons of runs."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command
from mindspeed_mm.tasks.evaluate import PROG, job_parser, main

COMMAND = Command(
    verb="eval",
    summary="Score generated videos by task, and compare runs",
    usage="RESULTS... [--data DATA] [--compare]",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(),
    common={
        "against": ("data", "task"),
        "what": ("metrics", "list", "encoder", "annotators"),
        "two runs": ("compare",),
        "output": ("page", "json"),
    },
    notes=("RESULTS: the output_path of generation runs, or results of vace_wan_inference.py",),
)
