"""Feature extraction: parses argv into a frozen job, and runs it.

The rows are split across the ranks, which communicate only at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_mm.data.check import check_manifest
from mindspeed_mm.data.content import STATE_FOLDER
from mindspeed_mm.data.manifest import FAILURES, Manifest, list_problems, scan_manifest, write_failures
from mindspeed_mm.data.manifest_row import Problem
from mindspeed_mm.errors import DataError
from mindspeed_mm.imports import quick_imports
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, log_table, one_line_errors, rank
from mindspeed_mm.tasks.jobs.extract import PROG, ExtractJob
from mindspeed_mm.tasks.summary import extraction_table

if TYPE_CHECKING:
    from mindspeed_mm.accelerator import Accelerator

logger = get_logger(__name__)


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Check the whole job and the list of clips, then run the job.

    Imports torch only for the run.
    """
    job = ExtractJob.from_argv(argv, prog=prog)
    if job.files.print_config:
        logger.info(job.to_json())
        return
    if not job.extract.no_check_clips:  # otherwise an earlier check has reported the notes
        for note in job.notes:
            logger.info(note)
        log_table(extraction_table(job))
    job.check_inputs()
    job.check_outputs()
    if job.files.dry_run:
        report_long_captions(job, check_clips(job))
        return
    with lock_folder(Path(job.save_path), choose="--save-path"):
        manifest = check_clips(job)
        with quick_imports():
            from mindspeed_mm.accelerator import Accelerator

        accelerator = Accelerator.detect()
        if rank() == 0:
            used = "bf16" in (job.model.ae.dtype, job.model.text_encoder.dtype)
            accelerator.hint_slow_bf16(used, "set ae.dtype and text_encoder.dtype of the model JSON to fp32")
        run(job, manifest, accelerator)


def check_clips(job: ExtractJob) -> Manifest | None:
    """Return the rows of the built-in dataset. Rank 0 opens their clips. Raises DataError."""
    manifest = scan(job)
    if manifest is not None and rank() == 0 and not job.extract.no_check_clips:
        probe_clips(job, manifest)
    return manifest


def report_long_captions(job: ExtractJob, manifest: Manifest | None) -> None:
    """Report the captions that the run will truncate. Raises WeightsError if the tokenizer is missing."""
    if manifest is None or rank() != 0:
        return
    with quick_imports():
        from mindspeed_mm.models.umt5.tokenizer import Tokenizer, find_tokenizer

    folder = job.tokenizer_path or find_tokenizer(Path(job.model.text_encoder.from_pretrained))
    Tokenizer(Path(folder), job.text_len).report_long(
        (record.address, caption) for record in manifest.records for caption in record.captions
    )


def scan(job: ExtractJob) -> Manifest | None:
    """Read the rows of the built-in dataset.

    Raises DataError if more rows are malformed than --skip-bad-samples allows.
    """
    config = job.raw_clips
    if config is None:
        return None
    if config.synthesis is not None:
        from mindspeed_mm.conditioning.recipe import read_recipe  # lazy, because it imports OpenCV

        read_recipe(config.synthesis)
    source = config.basic_parameters
    manifest = scan_manifest(source.data_path, source.data_folder)
    _enforce_error_budget(job, manifest, manifest.problems)
    if not job.extract.no_check_clips:
        logger.info(
            f"{len(manifest.records)} of {manifest.rows} clips of {source.data_path} are listed correctly"
        )
    return manifest


def probe_clips(job: ExtractJob, manifest: Manifest) -> None:
    """Open every clip that is new or changed.

    Raises DataError if more clips are unusable than --skip-bad-samples allows.
    """
    if job.raw_clips is None:
        return
    report = check_manifest(
        manifest,
        job.raw_clips.preprocess_parameters,
        timeout=job.extract.sample_timeout,
        memory=Path(job.save_path) / STATE_FOLDER,
    )
    for line in report.summary().split("\n"):
        logger.info(line)
    _enforce_error_budget(job, manifest, report.problems)


def _enforce_error_budget(job: ExtractJob, manifest: Manifest, problems: Sequence[Problem]) -> None:
    if not problems:
        return
    bad = len({problem.row for problem in problems})
    message = list_problems(problems, manifest.rows)
    if bad <= job.extract.skip_bad_samples and bad < manifest.rows:
        if not job.extract.no_check_clips:
            logger.warning(message)
        return
    fix = "correct them"
    if rank() == 0:
        with suppress(OSError):  # the error below is more important
            write_failures(Path(job.save_path), [(problem.row, str(problem)) for problem in problems])
            fix += f" ({Path(job.save_path) / FAILURES})"
    fix += "" if bad == manifest.rows else f", or skip them: --skip-bad-samples {bad}"
    raise DataError(message, fix=fix)


def run(job: ExtractJob, manifest: Manifest | None, accelerator: Accelerator) -> None:
    """Load the models, encode this rank's rows, and write the list."""
    with quick_imports():
        from mindspeed_mm.tasks.extraction import build_dataset, build_extraction, extract, gloo_group

    dataset = build_dataset(job, manifest)
    with gloo_group() as ranks:
        extraction = build_extraction(job, dataset, accelerator)
        extract(job, dataset, extraction, ranks, manifest)
