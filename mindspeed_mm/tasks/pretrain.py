"""Pre-training and fine-tuning: argv → frozen job → run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob

if TYPE_CHECKING:
    from mindspeed_mm.accelerator import Accelerator

logger = get_logger(__name__)


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Check the whole job first; torch is imported only when there is something to run."""
    job = PretrainJob.from_argv(argv)
    if not job.files.dry_run or job.files.check_inputs:
        job.check_inputs()
    announce(job)
    if job.files.dry_run:
        return
    from datetime import timedelta

    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.distributed.launch import launch

    accelerator = Accelerator.detect()
    asked = job.parallel.distributed_backend
    backend = "gloo" if asked == "gloo" else None
    with launch(accelerator, timedelta(minutes=job.parallel.distributed_timeout_minutes), backend):
        run(job, accelerator)


def announce(job: PretrainJob) -> None:
    """Print what does nothing here, and the job itself."""
    for note in job.notes:
        logger.info(note)
    logger.info(f"job: {job.to_json()}")


def run(job: PretrainJob, accelerator: Accelerator) -> None:
    """Build every part and train. Inside a process group."""
    from mindspeed_mm.tasks.assembly import assemble
    from mindspeed_mm.training.loop import TrainLoop

    TrainLoop(job.training, assemble(job, accelerator)).run()
