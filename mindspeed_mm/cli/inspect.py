"""`vace inspect`: mm-inspect."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.tools.inspect_samples import job_parser, main

PROG = "vace inspect"


def _parser(_: Sequence[str] | None) -> FlagParser:
    return job_parser(PROG)


def _run(argv: Sequence[str]) -> None:
    main(argv, prog=PROG)


COMMAND = Command(
    verb="inspect",
    summary="Check a dataset, and draw what the model sees of one sample or feature",
    usage="PATH [--key value]...",
    parser=_parser,
    run=_run,
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
