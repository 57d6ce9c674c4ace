"""`vace init`: a project folder with the scripts and settings of a model."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command
from mindspeed_mm.tools.project import job_parser, main

PROG = "vace init"


COMMAND = Command(
    verb="init",
    summary="Copy the scripts and settings of a model into a new folder",
    usage="FOLDER [--model 1.3B|14B|A14B|tiny|all]",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(),
    common={"whose": ("model",)},
    notes=("The commands of the guide (examples/vace/README.md) run in this folder.",),
)
