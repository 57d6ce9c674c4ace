"""`vace inspect`: mm-inspect."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.tools.inspect_samples import job_parser, main

PROG = "vace inspect"


COMMAND = Command(
    verb="inspect",
    summary="Check a dataset, and draw what the model sees of one sample or feature",
    usage="PATH [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(ConfigFile("--data-config", "data JSON of raw clips"),),
    common={
        "what": ("index", "vae", "decode-frames"),
        "output": ("out",),
        "check": ("skip-bad-samples", "workers"),
    },
    notes=(
        "PATH: data.txt, data.json, .jsonl, a data JSON, a feature file, or their folder",
        "What the flags mean: vace inspect --help-all",
    ),
)
