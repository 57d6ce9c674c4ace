"""`vace generate`: the job of Wan-VACE-Inference.py."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.cli.ranks import Launch
from mindspeed_mm.tasks.generate import main
from mindspeed_mm.tasks.jobs.generate import job_parser

PROG = "vace generate"


COMMAND = Command(
    verb="generate",
    summary="Generate videos; each key of the JSON is a flag too",
    usage="CONFIG.json [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=(ConfigFile("", "inference JSON (or without --config)"),),
    common={
        "texts": ("prompt", "negative-prompt", "prompts-file"),
        "inputs": (
            "video-path",
            "mask-path",
            "image-path",
            "first-frame-path",
            "last-frame-path",
            "outpaint",
        ),
        "video": ("height", "width", "num-frames", "fps", "seed"),
        "sampling": ("steps", "guidance-scale", "shift", "solver", "preset", "context-scale"),
        "weights": ("transformer", "vae", "text-encoder"),
        "run": ("output-path", "dtype", "offload", "tiled", "data-parallel"),
    },
    launch=Launch(check="--dry-run --check-inputs"),
)
