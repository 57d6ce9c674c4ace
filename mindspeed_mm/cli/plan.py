"""`vace plan`: the memory and time of a run before it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mindspeed_mm.cli.command import TRAINING_FILES, Command
from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.tasks import plan_generation
from mindspeed_mm.tasks.jobs.plan import PROG, plan_parser
from mindspeed_mm.tasks.plan import main


def parser(argv: Sequence[str] | None) -> FlagParser:
    """Build the parser with the flags of training, or with `--generate` of generation, and of the planner."""
    if not any(word.partition("=")[0] == plan_generation.FLAG for word in argv or ()):
        made = plan_parser(PROG)
        help_ = "plan a generation run from this inference JSON; its keys become flags"
        made.add_argument(plan_generation.FLAG, metavar="CONFIG.json", help=help_)
        return made
    return plan_generation.plan_parser(PROG)


COMMAND = Command(
    verb="plan",
    summary="Estimate memory and time of a training or generation run before its launch",
    usage="--config FILE... | --generate CONFIG.json [--key value]...",
    parser=parser,
    run=partial(main, prog=PROG),
    files=TRAINING_FILES,
    common={
        "devices": ("device", "devices", "mfu", "calibrate"),
        "generation": ("generate",),
        "clip": ("frames", "height", "width", "refs"),
        "output": ("json", "picture"),
        "the run": (
            "micro-batch-size",
            "global-batch-size",
            "train-iters",
            "context-parallel-size",
            "lora-rank",
        ),
    },
)
