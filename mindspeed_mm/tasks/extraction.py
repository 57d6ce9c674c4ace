"""Runs feature extraction: loads the models, splits the rows across ranks, writes the list and the report.

This is the part of `tasks.extract` that needs torch.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm.accelerator import DTYPES, Accelerator
from mindspeed_mm.conditioning.extraction import DEFAULT_BATCH, Extraction, Failed
from mindspeed_mm.conditioning.reading import FeatureKeys
from mindspeed_mm.conditioning.recipe import read_recipe
from mindspeed_mm.conditioning.synthesis import SynthesizedDataset
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder
from mindspeed_mm.data.content import STATE_FOLDER
from mindspeed_mm.data.dataset import FEATURE_FOLDER, LISTING, RawDataset, VaceDataset
from mindspeed_mm.data.features import NULL_PROMPT_FILE, Finished, write_null_prompt
from mindspeed_mm.data.manifest import FAILURES, Manifest, write_failures
from mindspeed_mm.data.packed import read_header
from mindspeed_mm.data.registry import DATASETS
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.distributed.launch import join_group
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import write_json_lines, write_text
from mindspeed_mm.leftovers import sweep
from mindspeed_mm.log import get_logger, on_every_rank, rank, world_size
from mindspeed_mm.models.umt5.encoder import LazyTextEncoder, TextEncoder, load_text_encoder
from mindspeed_mm.models.wan.vae import LazyVae, WanVae, load_vae
from mindspeed_mm.processes import Stopped, deferred, handling_signals, stop_signal
from mindspeed_mm.progress import Progress
from mindspeed_mm.registry import resolve
from mindspeed_mm.tasks.jobs.extract import ExtractJob

logger = get_logger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the number of ranks."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, and [] on the other ranks."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, gathered)
        return gathered or []


@contextmanager
def gloo_group() -> Iterator[Ranks]:
    """Join torchrun's ranks in a gloo group with a timeout of 14 days. A single process needs no group."""
    ranks = Ranks(rank(), world_size())
    if ranks.size > 1:
        join_group("gloo", timedelta(days=14))
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def build_dataset(job: ExtractJob, manifest: Manifest | None) -> RawDataset:
    """Build the dataset that the data JSON names. Raises ConfigError if it is not a dataset of clips."""
    config = job.raw_clips
    if config is not None and manifest is not None:
        plain = VaceDataset(config, manifest.records)
        if config.synthesis is None:
            return plain
        recipe = read_recipe(config.synthesis)
        for note in recipe.ignored("feature extraction"):
            logger.info(f"{config.synthesis}: {note}")
        made = SynthesizedDataset(plain, recipe)
        logger.info(f"synthesis: {made.describe()}")
        return made
    dataset = resolve(DATASETS.get(job.data.dataset_type).build)(job.data.dataset_param)
    missing = [name for name in ("records", "settings", "load") if not hasattr(dataset, name)]
    if missing:
        raise ConfigError(
            f"{job.data.dataset_type!r} has no {', '.join(missing)}, which feature extraction needs "
            "(docs/extend/dataset.md)",
            where=f"{job.files.mm_data}:dataset_param.dataset_type",
        )
    found: RawDataset = dataset
    return found


def build_extraction(job: ExtractJob, dataset: RawDataset, accelerator: Accelerator) -> Extraction:
    """Open the VAE and the text encoder. Each is moved to the device when it first encodes."""
    accelerator.activate()
    ae, text = job.model.ae, job.model.text_encoder
    vae = load_vae(ae.from_pretrained, dtype=DTYPES[ae.dtype], tiling=ae.enable_tiling)
    encoder = load_text_encoder(
        text.from_pretrained,
        job.tokenizer_path,
        dtype=DTYPES[text.dtype],
        text_len=job.text_len,
    )
    if rank() == 0:
        encoder.tokenizer.report_long(
            (record.address, caption) for record in dataset.records for caption in record.captions
        )
    keys = feature_keys(job, dataset, vae, encoder)
    return Extraction(
        vae=StreamEncoder(
            LazyVae(vae, accelerator.device), max_batch=job.extract.encode_batch or DEFAULT_BATCH
        ),
        text=PromptCache(LazyTextEncoder(encoder, accelerator.device)),
        keys=keys,
        load=dataset.load,
        save_path=Path(job.save_path),
        num_workers=job.extract.num_workers,
        timeout=job.extract.sample_timeout,
        rank=rank(),
        metadata={
            "vae": json.dumps(keys.vae, sort_keys=True),
            "text_encoder": json.dumps(keys.text, sort_keys=True),
            "settings": json.dumps(keys.pixels, sort_keys=True),
        },
    )


def feature_keys(job: ExtractJob, dataset: RawDataset, vae: WanVae, encoder: TextEncoder) -> FeatureKeys:
    """Return everything that a feature depends on except its files and captions."""
    ae, text = job.model.ae, job.model.text_encoder
    return FeatureKeys(
        pixels=dict(dataset.settings),
        vae={"fingerprint": vae.fingerprint, "dtype": ae.dtype, "tiling": ae.enable_tiling},
        text={"fingerprint": encoder.fingerprint, "dtype": text.dtype, "tokens": job.text_len},
    )


def extract(
    job: ExtractJob,
    dataset: RawDataset,
    extraction: Extraction,
    ranks: Ranks,
    manifest: Manifest | None = None,
) -> None:
    """Encode this rank's rows. At the end, rank 0 writes data.jsonl, the failures and the report."""
    if ranks.rank == 0:
        folder = extraction.save_path
        sweep([folder, folder / FEATURE_FOLDER, folder / STATE_FOLDER])
        store_null_prompt(extraction)
        write_text(extraction.save_path / "job.json", job.to_json() + "\n")
        write_failures(extraction.save_path, failures((), manifest))  # overwrites those of an earlier run
    left_out = len({problem.row for problem in manifest.problems} if manifest else ())
    allowed = job.extract.skip_bad_samples - left_out
    share = shard_rows(dataset.records, ranks)
    outcome = Outcome()
    started = time.perf_counter()
    with handling_signals(), deferred(), clip_progress(len(share), ranks) as progress:
        for row in extraction.run(share, lambda: stop_signal() != 0):
            outcome.add(row)
            progress.step(
                worked=isinstance(row, Finished) and row.fresh, note=f"failed {len(outcome.failed)}"
            )
            if len(outcome.failed) > allowed:
                with suppress(OSError):  # the error below is more important
                    write_failures(extraction.save_path, failures(outcome.failed, manifest))
                raise _too_many(outcome.failed, job.extract.skip_bad_samples)
        stopped = stop_signal()
    if stopped and ranks.size > 1:
        _log_stopped(stopped, outcome, len(share))
        raise Stopped(stopped, logged=True)
    gathered = ranks.gather(outcome)
    if ranks.rank == 0:
        total = Outcome.merged(gathered)
        rows = write_listing(extraction.save_path, total.finished)
        write_failures(extraction.save_path, failures(total.failed, manifest))
        _report(total, rows, left_out, time.perf_counter() - started, extraction)
        if len(total.failed) > allowed:
            raise _too_many(total.failed, job.extract.skip_bad_samples)
    if stopped:
        _log_stopped(stopped, outcome, len(share))
        raise Stopped(stopped, logged=True)


def clip_progress(share: int, ranks: Ranks) -> Progress:
    """Create a progress bar for rank 0's share. The shares of the other ranks are about as large."""
    name = "clips" if ranks.size == 1 else f"clips (rank 0 of {ranks.size})"
    return Progress(name, share, "clip")


def shard_rows(records: Sequence[SampleRecord], ranks: Ranks) -> list[SampleRecord]:
    """Return this rank's rows.

    Duplicates of a row go to the same rank, which encodes the row once. Otherwise two ranks would write the
    same file, each with its own row address in the metadata.
    """
    groups: dict[object, int] = {}
    for record in records:
        groups.setdefault(replace(record, address="", row=0), len(groups))
    return [
        record for record in records if groups[replace(record, address="", row=0)] % ranks.size == ranks.rank
    ]


@dataclass
class Outcome:
    """The rows that have finished or failed so far."""

    finished: list[Finished] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

    def add(self, row: Finished | Failed) -> None:
        """Add one row, and log its failure."""
        if isinstance(row, Failed):
            self.failed.append(row)
            logger.warning(f"cannot be used: {row.reason}")
        else:
            self.finished.append(row)

    @classmethod
    def merged(cls, parts: Sequence[Outcome]) -> Outcome:
        """Merge the rows of all ranks in manifest order."""
        finished = sorted((row for part in parts for row in part.finished), key=_manifest_order)
        failed = sorted((row for part in parts for row in part.failed), key=_manifest_order)
        return cls(finished, failed)


def _manifest_order(row: Finished | Failed) -> tuple[int, int]:
    drawn = row.record.synthesis
    return row.record.row, 0 if drawn is None else drawn.variant


def store_null_prompt(extraction: Extraction) -> None:
    """Write the embedding of the empty caption, unless that of this text encoder is already stored."""
    path = extraction.save_path / NULL_PROMPT_FILE
    fingerprint = json.dumps(extraction.keys.text, sort_keys=True)
    try:
        if read_header(path).get("__metadata__", {}).get("text_encoder") == fingerprint:
            return
    except DataError:
        pass  # missing or truncated, so it is written below
    write_null_prompt(path, extraction.text.encode([""])[0], fingerprint)


def write_listing(folder: Path, finished: Sequence[Finished]) -> int:
    """Write data.jsonl: each source row with the file and shape of its feature. Returns the row count."""
    write_json_lines(folder / LISTING, [_listed(row) for row in finished])
    return len(finished)


def _listed(row: Finished) -> dict[str, Any]:
    record: SampleRecord = row.record
    captions = record.captions
    return {
        "video": str(record.video),
        "cap": captions[0] if len(captions) == 1 else list(captions),
        "src_video": None if record.src_video is None else str(record.src_video),
        "src_ref_images": [str(path) for path in record.src_ref_images] or None,
        "src_video_mask": None if record.src_mask is None else str(record.src_mask),
        "file": f"{FEATURE_FOLDER}/{row.key}.safetensors",
        "shape": list(row.shape),
        "num_refs": row.num_refs,
        **({} if record.synthesis is None else {"task": record.synthesis.task}),
    }


def failures(failed: Sequence[Failed], manifest: Manifest | None) -> list[tuple[int, str]]:
    """Return the row and reason of each failure, first those found before the run, then those of the run."""
    before = [(problem.row, str(problem)) for problem in (manifest.problems if manifest else ())]
    return before + [(row.record.row, row.reason) for row in failed]


def _too_many(failed: Sequence[Failed], allowed: int) -> DataError:
    reasons = "; ".join(row.reason for row in failed[:20])
    return DataError(reasons, fix=f"to skip them, pass --skip-bad-samples {max(len(failed), allowed + 1)}")


def _report(total: Outcome, rows: int, left_out: int, seconds: float, extraction: Extraction) -> None:
    fresh = sum(row.fresh for row in total.finished)
    spent = extraction.seconds
    logger.info(
        f"extracted {fresh} clips in {seconds:.1f} s ({fresh / max(seconds, 1e-9):.2f} clips/s), "
        f"{len(total.finished) - fresh} already existed, {len(total.failed)} failed"
        + (f", {left_out} unusable rows were skipped" if left_out else "")
        + f"; {rows} rows in {extraction.save_path / LISTING}"
        + (f", the others in {extraction.save_path / FAILURES}" if left_out or total.failed else "")
    )
    logger.info(
        f"rank 0 spent {spent.read:.1f} s waiting for clips, {spent.vae:.1f} s in the VAE, "
        f"{spent.text:.1f} s in the text encoder, {spent.write:.1f} s waiting for writes; "
        f"{extraction.vae.encoded} of {extraction.vae.requested} streams had to be encoded"
    )
    for row in total.failed[:20]:
        logger.info(f"  failed: {row.reason}")


def _log_stopped(number: int, outcome: Outcome, share: int) -> None:
    logger.info(
        f"stopped by {signal.Signals(number).name} after {len(outcome.finished)} of {share} clips; "
        "run the command again to resume from here",
        extra=on_every_rank(),
    )
