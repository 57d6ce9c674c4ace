"""`vace prepare`: the inputs of VACE tasks from plain clips and images."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.tasks.prepare import job_parser, main

PROG = "vace prepare"


COMMAND = Command(
    verb="prepare",
    summary="Make src_video, src_mask and references of a task from clips and images",
    usage="--task NAME --video CLIP --out FOLDER [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(
        ConfigFile("--options", "JSON or YAML with the task's options", suffixes=(".json", ".yaml", ".yml")),
    ),
    common={
        "what": ("task", "list"),
        "from": ("video", "image"),
        "a dataset": ("data", "recipe", "num-workers"),
        "to": ("out",),
        "the subject": ("mode", "bbox", "mask", "maskaug-mode"),
        "extension": ("expand-num", "num-frames", "ref-num"),
        "outpainting": ("direction", "expand-ratio"),
    },
    notes=("All tasks and their options: vace prepare --list",),
)
