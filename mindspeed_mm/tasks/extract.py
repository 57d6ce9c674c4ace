"""Feature extraction: argv → frozen job → run. Ranks share the rows out, and meet only at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mindspeed_mm.data.manifest import Manifest, list_problems, scan_manifest
from mindspeed_mm.errors import DataError
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.tasks.jobs.extract import ExtractJob

if TYPE_CHECKING:
    from mindspeed_mm.accelerator import Accelerator

logger = get_logger(__name__)


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """Check the whole job and the list of clips first; torch is imported only when there is something to run."""
    job = ExtractJob.from_argv(argv)
    for note in job.notes:
        logger.info(note)
    logger.info(f"job: {job.to_json()}")
    job.check_inputs()
    manifest = scan(job)
    if job.files.dry_run:
        return
    from mindspeed_mm.accelerator import Accelerator

    run(job, manifest, Accelerator.detect())


def scan(job: ExtractJob) -> Manifest | None:
    """The rows of the built-in dataset. Raises DataError when more are unusable than --skip-bad-samples allows."""
    config = job.raw_clips
    if config is None:
        return None
    source = config.basic_parameters
    manifest = scan_manifest(source.data_path, source.data_folder)
    for note in manifest.notes:
        logger.info(note)
    if manifest.problems:
        bad = len({problem.row for problem in manifest.problems})
        message = list_problems(manifest.problems, manifest.rows)
        if bad > job.extract.skip_bad_samples:
            raise DataError(f"{message}; correct them, or go on without them: --skip-bad-samples {bad}")
        logger.warning(message)
    logger.info(f"{len(manifest.records)} clips are listed in {source.data_path}")
    return manifest


def run(job: ExtractJob, manifest: Manifest | None, accelerator: Accelerator) -> None:
    """Load the models, encode this rank's rows, write the list."""
    from mindspeed_mm.tasks.extraction import build_dataset, build_extraction, extract, together

    dataset = build_dataset(job, manifest)
    with together() as world:
        extraction = build_extraction(job, dataset, accelerator)
        extract(job, dataset, extraction, world, manifest)
