"""Turns a dataset of plain clips into a dataset of VACE samples.

The work is split across processes and can be resumed. This process does not import torch.

out/data.json               rows that feature extraction reads
out/rows/000017-0-NAME/     video, src_video, src_mask, references, prepare.json of one sample
out/sheets/NAME.png         the first samples of each entry of the recipe
out/failed.jsonl            rows that could not be made, and why
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mindspeed_mm.conditioning.annotate.opencv import opencv
from mindspeed_mm.conditioning.prepared import RECORD, cannot_write, write_files
from mindspeed_mm.conditioning.recipe import Draw, Recipe, draws
from mindspeed_mm.conditioning.sheets import sample_strips
from mindspeed_mm.conditioning.tasks.spec import Clip, Sources, count_bounds
from mindspeed_mm.data.content import digest_of_values, signature_of
from mindspeed_mm.data.images import read_image
from mindspeed_mm.data.manifest import FAILURES, Manifest, scan_manifest
from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.sheet import Strip, draw_sheet
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.files import atomic_path, display_path, write_json, write_json_lines
from mindspeed_mm.leftovers import sweep, temporary_name
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger
from mindspeed_mm.processes import check_stop
from mindspeed_mm.progress import Progress
from mindspeed_mm.tasks.prepared_row import read_finished, sums_of

logger = get_logger(__name__)
LISTING = "data.json"
ROWS, SHEETS = "rows", "sheets"
_VERSION = 1  # version of a finished row's content
_ON_SHEET = 4  # samples on the sheet of an entry


@dataclass(frozen=True)
class Sample:
    """A sample to make from a row."""

    record: SampleRecord
    variant: int
    draw: Draw

    @property
    def name(self) -> str:
        """The name of the sample's folder."""
        return f"{self.record.row:06d}-{self.variant}-{self.draw.name}"

    def key(self) -> str:
        """Return a digest of everything that the sample's files depend on. Raises OSError."""
        return digest_of_values(
            {
                "version": _VERSION,
                "task": self.draw.task.name,
                "options": self.draw.options.model_dump(mode="json"),
                "files": [[slot, str(path), signature_of(path)] for slot, path in self.record.files],
            }
        )


@dataclass
class Plan:
    """All samples to make from a dataset, and the failures that are already known."""

    samples: list[Sample]
    failures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return a summary such as `40 samples of 20 clips: inpainting 22, framerefext 18`."""
        counts = Counter(sample.draw.name for sample in self.samples)
        clips = len({sample.record.row for sample in self.samples})
        each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        return f"{len(self.samples)} samples of {clips} clips: {each or 'none'}"


def plan_samples(data: str | Path, recipe: Recipe) -> Plan:
    """Read the dataset and draw a task for each of its samples.

    Raises DataError if the list cannot be read.
    """
    manifest = scan_manifest(data)
    plan = Plan([], notes=list(manifest.notes))
    plan.notes += recipe.ignored("vace prepare")
    plan.failures += _bad_rows(manifest)
    left_out = replaced = 0
    for record in manifest.records:
        replaced += record.src_video is not None
        try:
            found = draws(recipe, record.row, str(record.video))
        except MindSpeedMMError as error:
            plan.failures.append(failure(record, 0, "", error))
            continue
        left_out += not found
        plan.samples += [Sample(record, variant, drawn) for variant, drawn in enumerate(found)]
    if left_out:
        plan.notes.append(f"{left_out} clips match no `clips` of the recipe and are skipped")
    if replaced:
        plan.notes.append(f"src_video of {replaced} rows is replaced with that of their task")
    return plan


def prepare_dataset(plan: Plan, out: Path, *, num_workers: int, timeout: float) -> list[Path]:
    """Make every unfinished sample. Returns the paths of the written list and sheets.

    If rows fail, raises DataError at the end. failed.jsonl lists these rows, and the list has the others.
    """
    rows = out / ROWS
    failures = list(plan.failures)
    finished: list[tuple[Sample, dict[str, Any]]] = []
    with lock_folder(out, choose="--out"):
        rows.mkdir(parents=True, exist_ok=True)
        sweep([rows, out, out / SHEETS])
        try:
            for sample, made in _make_samples(plan.samples, rows, num_workers, timeout):
                if isinstance(made, MindSpeedMMError):
                    failures.append(failure(sample.record, sample.variant, sample.draw.name, made))
                else:
                    finished.append((sample, made))
            check_stop()
            finished.sort(key=lambda entry: entry[0].name)
        finally:
            sweep([rows])
        sheets = list(_write_sheets(finished, rows, out / SHEETS))
        write_json(out / LISTING, [row_of(sample, made) for sample, made in finished])
        _write_failures(out / FAILURES, failures)
    notes = Counter(note for _, made in finished for note in made["notes"])
    for note, count in notes.most_common(5):
        logger.info(f"{note}" + (f" ({count} rows)" if count > 1 else ""))
    unlisted = {entry.name for entry in os.scandir(rows)} - {sample.name for sample in plan.samples}
    if unlisted:
        logger.info(f"{rows}: {len(unlisted)} folders of another recipe are not in {LISTING}")
    if failures:
        first = failures[0]
        raise DataError(
            (
                f"{len(failures)} of {len(failures) + len(finished)} samples failed, the first: "
                f"{first['reason']}"
            ),
            where=out / FAILURES,
            fix="correct them and run the same command again; finished rows are kept",
        )
    return [out / LISTING, *sheets]


def row_of(sample: Sample, made: dict[str, Any]) -> dict[str, Any]:
    """Return the data.json row of a sample."""
    folder = f"{ROWS}/{sample.name}"
    captions = sample.record.captions
    row: dict[str, Any] = {
        "video": f"{folder}/{made['video']}",
        "cap": captions[0] if len(captions) == 1 else list(captions),
    }
    for key, ours in (("src_video", "src_video"), ("src_video_mask", "src_mask")):
        if made.get(ours):
            row[key] = f"{folder}/{made[ours]}"
    if made["src_ref_images"]:
        row["src_ref_images"] = [f"{folder}/{name}" for name in made["src_ref_images"]]
    return row


def failure(record: SampleRecord, variant: int, name: str, error: MindSpeedMMError) -> dict[str, Any]:
    """Return the failed.jsonl line of a failure."""
    return {
        "row": record.row,
        "variant": variant,
        "entry": name,
        "where": f"{record.address}: {error.where}" if error.where else record.address,
        "problem": error.problem + (f"; expected {error.expected}" if error.expected else ""),
        "fix": error.fix,
        "reason": f"{record.address}: {error}",
    }


def _bad_rows(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for problem in manifest.problems:
        yield {
            "row": problem.row,
            "variant": 0,
            "entry": "",
            "where": problem.address,
            "problem": problem.message,
            "fix": "",
            "reason": str(problem),
        }


def _write_failures(path: Path, failures: Sequence[dict[str, Any]]) -> None:
    if failures:
        write_json_lines(path, failures)
    else:
        path.unlink(missing_ok=True)


def _make_samples(
    samples: Sequence[Sample], rows: Path, num_workers: int, timeout: float
) -> Iterator[tuple[Sample, dict[str, Any] | MindSpeedMMError]]:
    """Yield each sample with its record or its error.

    Finished samples come first and need no worker process.
    """
    missing = []
    with Progress("samples", len(samples), "sample") as progress:
        failed = 0
        for sample in samples:
            done = _finished(sample, rows)
            if done is None:
                missing.append(sample)
            else:
                progress.step(worked=False)
                yield sample, done
        count = min(num_workers, len(missing))
        with ReadAhead(partial(make_sample, rows=rows), num_workers=count, timeout=timeout) as workers:
            for sample, made in workers.map(missing):
                failed += isinstance(made, MindSpeedMMError)
                progress.step(note=f"failed {failed}" if failed else "")
                yield sample, made


def _finished(sample: Sample, rows: Path) -> dict[str, Any] | None:
    """Return the record of an earlier run with the same files, task and options, if there is one."""
    try:
        return read_finished(rows / sample.name, sample.key())
    except OSError:  # a source cannot be read, which make_sample reports
        return None


def make_sample(sample: Sample, rows: Path) -> dict[str, Any]:
    """Make the folder of one sample atomically, and return the content of its prepare.json.

    Raises DataError and ConfigError.
    """
    if multiprocessing.parent_process() is not None:
        opencv().setNumThreads(1)  # the worker processes already use all cores
    record, task, folder = sample.record, sample.draw.task, rows / sample.name
    draft = rows / temporary_name(sample.name)
    try:
        draft.mkdir()
        key = sample.key()
        with_images = count_bounds(task.needs, "image")[1] > 0
        sources = Sources.open([record.video], record.src_ref_images if with_images else ())
        prepared = task.prepare(sources, _with_mask(sample))
        settings: dict[str, Any] = {
            "task": task.name,
            "options": sample.draw.options.model_dump(mode="json"),
            "source": display_path(record.video),
            "notes": list(prepared.notes),
            "key": key,
        }
        made = write_files(prepared, draft, settings)
        made["networks"] = dict(prepared.networks)
        encoded = [made[slot] for slot in ("src_video", "src_mask") if made.get(slot)]
        # Links need no checksum, because `key` covers their sources.
        made["files"] = sums_of(draft, [*encoded, *made["src_ref_images"]])
        made["video"] = _linked(record.video, draft / f"video{record.video.suffix}")
        if not made["src_ref_images"]:
            made["src_ref_images"] = [
                _linked(path, draft / f"reference_{number}{path.suffix}")
                for number, path in enumerate(record.src_ref_images)
            ]
        write_json(draft / RECORD, made)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        return made
    except OSError as error:
        raise cannot_write(rows, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _with_mask(sample: Sample) -> Any:
    """Return the options, with the row's mask if the mode needs a mask and the recipe sets none."""
    options, mask = sample.draw.options, sample.record.src_mask
    takes = str(getattr(options, "mode", "")).startswith("mask") and getattr(options, "mask", "") is None
    return options.model_copy(update={"mask": str(mask)}) if takes and mask is not None else options


def _linked(path: Path, link: Path) -> str:
    """Hard-link a file instead of copying it, and return the name of the link.

    Makes a symbolic link to a folder, or if the file system has no hard links.
    """
    try:
        os.link(path.resolve(), link)
    except OSError:
        link.symlink_to(path.resolve())
    return link.name


def _write_sheets(
    finished: Sequence[tuple[Sample, dict[str, Any]]], rows: Path, folder: Path
) -> Iterator[Path]:
    """Draw a sheet with the first samples of each recipe entry, and yield the paths."""
    by_name: dict[str, list[tuple[Sample, dict[str, Any]]]] = {}
    for sample, made in finished:
        by_name.setdefault(sample.draw.name, []).append((sample, made))
    for name, samples in by_name.items():
        shown = samples[:_ON_SHEET]
        strips = [strip for sample, made in shown for strip in _strips(sample, made, rows / sample.name)]
        facts = [f"{len(samples)} samples; shown: the first {len(shown)}", samples[0][0].draw.task.summary]
        path = folder / f"{name}.png"
        with atomic_path(path) as draft:
            draw_sheet(name, strips, facts=facts, columns=6).save(draft, format="PNG")
        yield path


def _strips(sample: Sample, made: dict[str, Any], folder: Path) -> list[Strip]:
    source, mask = (folder / made[key] if made.get(key) else None for key in ("src_video", "src_mask"))
    references = [read_image(folder / name) for name in made["src_ref_images"]]
    clip = Clip.open(folder / made["video"])
    return sample_strips(clip, source, mask, references, f"{sample.record.row}-{sample.variant}")
