"""`vace plan`: memory and time of a training run before its launch."""

from __future__ import annotations

from functools import partial

from mindspeed_mm.cli.command import Command, ConfigFile
from mindspeed_mm.tasks.jobs.plan import PROG, plan_parser
from mindspeed_mm.tasks.plan import main

COMMAND = Command(
    verb="plan",
    summary="Estimate memory and time of a training run before its launch",
    usage="--config FILE... [--device NAME] [--devices N] [training flags]",
    parser=lambda _: plan_parser(PROG),
    run=partial(main, prog=PROG),
    files=(
        ConfigFile("--mm-model", "model JSON", frozenset({"predictor"})),
        ConfigFile("--mm-data", "data JSON", frozenset({"dataset_param"})),
        ConfigFile("--mm-tool", "tools JSON", frozenset({"sorafeature", "profile", "memory_profile"})),
        ConfigFile("--fsdp2-config-path", "FSDP2 YAML", suffixes=(".yaml", ".yml")),
    ),
    common={
        "devices": ("device", "devices", "mfu", "calibrate"),
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
