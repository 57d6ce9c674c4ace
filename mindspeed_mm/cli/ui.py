"""`vace ui`: the page in the browser."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.ui.main import job_parser, main

PROG = "vace ui"


COMMAND = Command(
    verb="ui",
    summary="Edit clips, inspect datasets and follow runs in the browser",
    usage="[CONFIG.json | --model FOLDER | --server URL] [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(ConfigFile("", "inference JSON (default: the tiny weights)"),),
    common={
        "weights": ("model", "server", "devices"),
        "page": ("lang", "host", "port", "token-file"),
        "storage": ("data-dir", "root"),
    },
)
