"""`python examples/vace/inference/Wan-VACE-Inference.py CONFIG.json [--key value…]`: argv → job → videos."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.summary import generation_table, log_table

LOGGER = get_logger(__name__)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """The command. torch is imported only when the job is sound."""
    job = GenerateJob.from_argv(sys.argv[1:] if argv is None else argv)
    if job.print_config:
        LOGGER.info(job.to_json())
        return
    for note in job.notes:
        LOGGER.info(note)
    if job.dry_run:
        LOGGER.info(job.to_json())
        return
    log_table(generation_table(job))
    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.tasks.generate_videos import run

    accelerator = Accelerator.detect()
    accelerator.hint_slow_bf16(job.run.dtype == "bf16", "set dtype to fp32 (--dtype fp32)")
    run(job, accelerator)
