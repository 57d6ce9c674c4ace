"""`vace extract`: the job of get_vace_feature.py."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.cli.ranks import Launch
from mindspeed_mm.tasks.extract import main
from mindspeed_mm.tasks.jobs.extract import job_parser

PROG = "vace extract"


COMMAND = Command(
    verb="extract",
    summary="Encode clips, conditions and captions into features for training",
    usage="--config FILE... [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(
        ConfigFile("--mm-data", "data JSON", frozenset({"dataset_param"})),
        ConfigFile("--mm-model", "model JSON", frozenset({"ae", "text_encoder"})),
        ConfigFile("--mm-tool", "tools JSON", frozenset({"sorafeature", "profile", "memory_profile"})),
    ),
    common={
        "output": ("save-path",),
        "bad samples": ("skip-bad-samples", "sample-timeout"),
        "speed": ("num-workers", "encode-batch"),
    },
    launch=Launch(check="--dry-run", show_check=True, rank_flags="--no-check-clips"),
)
