"""`vace doctor`: checks whether this machine is ready for a run."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command
from mindspeed_mm.tools.doctor import PROG, job_parser, main

COMMAND = Command(
    verb="doctor",
    summary="Check packages, devices, process groups, disks and limits",
    usage="[--data FOLDER] [--out FOLDER]",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(),
    common={"where": ("data", "out"), "output": ("json",)},
    notes=("Exits with 1 if something is broken. Changes nothing.",),
)
