"""Pre-training and fine-tuning: parses argv into a frozen job, and runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.mm.layout import is_half_written, restore_replaced
from mindspeed_mm.imports import quick_imports
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, launch_number, local_rank, log_table, one_line_errors, rank
from mindspeed_mm.tasks.jobs.plan import estimate
from mindspeed_mm.tasks.jobs.pretrain import PROG, PretrainJob
from mindspeed_mm.tasks.summary import training_table, write_job

if TYPE_CHECKING:
    from mindspeed_mm.accelerator import Accelerator

logger = get_logger(__name__)
NOT_CHECKED = (
    "not checked: whether features and weights exist, and whether the output folders can be written; "
    "add --check-inputs on the machine of the run"
)


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Check the whole job, then run it. Imports torch only for the run."""
    job = PretrainJob.from_argv(argv, prog=prog)
    if job.files.print_config:
        logger.info(job.to_json())
        return
    checks_inputs = not job.files.dry_run or job.files.check_inputs
    if checks_inputs:
        job.check_inputs()
    job.check_outputs()
    log_job(job)
    if job.files.dry_run:
        if line := estimate(job):
            log_table([("estimate", line)])
        if not checks_inputs:
            logger.info(NOT_CHECKED)
        return
    with hold_folder(job):
        join_and_run(job)


@contextmanager
def hold_folder(job: PretrainJob) -> Iterator[None]:
    """Lock --save, and remove what killed runs left there. Raises LaunchError if it is locked."""
    if job.training.checkpoint.save is None:
        yield
        return
    folder = Path(job.training.checkpoint.save)
    with lock_folder(folder, choose="--save"):
        if rank() == 0:
            restore_replaced(folder)
            sweep([folder], more=is_half_written)
            write_job(folder, job.to_json())
        yield


def join_and_run(job: PretrainJob) -> None:
    """Detect the device, join the other ranks, and train."""
    from datetime import timedelta

    with quick_imports():
        from mindspeed_mm.accelerator import Accelerator
        from mindspeed_mm.distributed.launch import launch

    accelerator = Accelerator.detect()
    if rank() == 0:
        accelerator.hint_slow_bf16(
            job.fsdp2.param_dtype == "bf16",
            (
                "set predictor.dtype of the model JSON and param_dtype of fsdp2_config.yaml to fp32, and "
                "omit --bf16"
            ),
        )
    requested = job.parallel.distributed_backend
    backend = "gloo" if requested == "gloo" else None
    with launch(accelerator, timedelta(minutes=job.parallel.distributed_timeout_minutes), backend):
        run(job, accelerator)


def log_job(job: PretrainJob) -> None:
    """Log the job's notes and its summary table."""
    for note in job.notes:
        logger.info(note)
    log_table(training_table(job))


def run(job: PretrainJob, accelerator: Accelerator) -> None:
    """Build every part and train. Must run inside a process group."""
    with quick_imports():
        from mindspeed_mm.models.containers.checksums import verifying
        from mindspeed_mm.tasks.assembly import assemble

    # All processes of a machine read the same weights, so each verifies its share of the checksums.
    share = (local_rank(), max(launch_number("LOCAL_WORLD_SIZE", 1), local_rank() + 1))
    with verifying(not job.training.checkpoint.no_verify_checksums, *share):
        trainer = assemble(job, accelerator)
    try:
        trainer.run()
    finally:
        trainer.data.batches.close()  # ends the prefetching processes
