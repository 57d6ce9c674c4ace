"""`vace generate`: the job of Wan-VACE-Inference.py."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.cli.ranks import Launch
from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.tasks.generate import main
from mindspeed_mm.tasks.jobs.generate import job_parser

PROG = "vace generate"
SERVER = "--server"


def parser() -> FlagParser:
    """Build the parser with the flags of the job and of the place where it runs."""
    parser = job_parser(PROG)
    parser.add_argument(
        SERVER, metavar="URL", help="generate the videos on this vace server, with its weights"
    )
    return parser


def run(argv: Sequence[str]) -> None:
    """Generate the videos on this machine or on a server."""
    words = [
        part for word in argv for part in (word.split("=", 1) if word.startswith(f"{SERVER}=") else [word])
    ]
    if SERVER not in words:
        main(argv, PROG)
        return
    index = words.index(SERVER)
    from mindspeed_mm.serve.client import main as send

    send([*words[:index], *words[index + 2 :]], words[index + 1], PROG)


COMMAND = Command(
    verb="generate",
    summary="Generate videos; each key of the JSON is a flag too",
    usage="CONFIG.json [--key value]...",
    parser=lambda _: parser(),
    run=run,
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
        "weights": ("transformer", "vae", "text-encoder", "loras", "quantize"),
        "run": ("output-path", "dtype", "offload", "tiled", "data-parallel", "server"),
    },
    launch=Launch(check="--dry-run --check-inputs"),
)
