"""`vace train`: the job of pretrain_vace.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mindspeed_mm.cli.command import TRAINING_FILES, Command
from mindspeed_mm.cli.ranks import Launch
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob, job_parser
from mindspeed_mm.tasks.pretrain import main

PROG = "vace train"


def _batch(argv: Sequence[str], ranks: int) -> int:
    training = PretrainJob.from_argv(argv, ranks, PROG).training
    # A run that ends before its first log line has no speed to report.
    is_logged = (training.batch.train_iters or 0) >= training.log.log_interval
    return (training.batch.global_batch_size or 0) if is_logged else 0


COMMAND = Command(
    verb="train",
    summary="Pre-train or fine-tune VACE on extracted features",
    usage="--config FILE... --lr LR --train-iters N [--key value]...",
    parser=lambda _: job_parser(PROG),
    run=partial(main, prog=PROG),
    files=TRAINING_FILES,
    common={
        "batches": ("micro-batch-size", "global-batch-size", "train-iters", "num-workers", "seed"),
        "optimizer": ("lr", "min-lr", "lr-decay-style", "lr-warmup-iters", "weight-decay", "clip-grad"),
        "checkpoints": ("save", "save-interval", "load", "finetune"),
        "memory": ("context-parallel-size", "recompute-granularity"),
        "logs": ("log-interval", "log-throughput", "tensorboard-dir"),
        "evaluation": ("eval-interval", "eval-iters"),
    },
    launch=Launch(check="--dry-run --check-inputs", batch=_batch),
)
