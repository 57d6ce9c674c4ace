"""The command `python examples/vace/inference/Wan-VACE-Inference.py CONFIG.json [--key value…]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mindspeed_mm.data.clips import check_av_version
from mindspeed_mm.imports import quick_imports
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, log_table, one_line_errors, rank, world_size
from mindspeed_mm.tasks.jobs.generate import PROG, GenerateJob
from mindspeed_mm.tasks.plan_generation import estimate
from mindspeed_mm.tasks.summary import generation_table

LOGGER = get_logger(__name__)
NOT_CHECKED = (
    "not checked: whether the weights exist, and whether output_path can be written; add --check-inputs on "
    "the machine of the run."
)

_LISTED = 4  # maximum number of missing weights to list


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Run the command. Imports torch only after the job has been checked."""
    job = GenerateJob.from_argv(sys.argv[1:] if argv is None else argv, prog)
    if job.print_config:
        LOGGER.info(job.to_json())
        return
    for note in job.notes:
        LOGGER.info(note)
    check_av_version()
    job.check_outputs()
    log_table(generation_table(job))
    if job.dry_run:
        if line := estimate(job, world_size()):
            log_table([("estimate", line)])
        if not job.check_inputs:
            more = f" and {len(job.not_found) - _LISTED} more" if len(job.not_found) > _LISTED else ""
            missing = f" Not found: {', '.join(job.not_found[:_LISTED])}{more}." if job.not_found else ""
            LOGGER.info(f"{NOT_CHECKED}{missing}")
        return
    folder = Path(job.run.output_path)
    with lock_folder(folder, choose="output_path"):
        with quick_imports():
            from mindspeed_mm.accelerator import Accelerator
            from mindspeed_mm.tasks.generate_videos import run

        if rank() == 0:
            folders = [folder / video.name for video in job.videos]
            sweep([folder, *folders, *(part for each in folders for part in each.glob("window_*"))])
        accelerator = Accelerator.detect()
        accelerator.hint_slow_bf16(job.run.dtype == "bf16", "set dtype to fp32 (--dtype fp32)")
        run(job, accelerator)
