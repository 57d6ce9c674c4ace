"""Checks every clip of a dataset before any device is used.

Reports which rows cannot be used and why, and what the other rows yield. Does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from mindspeed_mm.data.check_row import ClipFacts, RowTask, check_row
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.content import ClipIndex
from mindspeed_mm.data.manifest import Manifest, list_problems, scan_manifest
from mindspeed_mm.data.manifest_row import Problem
from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import write_json
from mindspeed_mm.limits import usable_cores
from mindspeed_mm.log import get_logger
from mindspeed_mm.progress import Progress

logger = get_logger(__name__)
T = TypeVar("T")
_CHUNK = 16  # rows sent to a process at once; a row takes about a millisecond


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Result of a check. `records` are the usable rows; `problems` say why the others cannot be used."""

    rows: int
    records: tuple[SampleRecord, ...]
    facts: tuple[ClipFacts, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def bad_rows(self) -> list[int]:
        """Indices of the rows with a problem, in order."""
        return sorted({problem.row for problem in self.problems})

    def enforce_error_budget(self, skip_bad_samples: int = 0, *, or_else: str = "") -> None:
        """Raise DataError with the problems if more than `skip_bad_samples` rows are bad or none is good.

        `or_else` describes an alternative to fixing the rows, such as a flag that skips them.
        """
        if len(self.bad_rows) > skip_bad_samples or not self.records:
            other = f", or {or_else}" if or_else and self.records else ""
            raise DataError(list_problems(self.problems, self.rows), fix=f"correct them{other}")

    def write(self, path: Path) -> None:
        """Write a JSON file with every excluded row and the reason."""
        skipped = [{"row": p.row, "address": p.address, "problem": p.message} for p in self.problems]
        content = {
            "rows": self.rows,
            "usable": len(self.records),
            "skipped": skipped,
            "notes": list(self.notes),
        }
        write_json(path, content)

    def summary(self) -> str:
        """Format the facts that matter before a run as a table, one per line."""
        facts = self.facts
        if not facts:
            return f"clips       none of {self.rows} can be used"
        seconds = [fact.seconds for fact in facts]
        bare = [() for fact in facts if not fact.conditions]
        lines = [
            (
                "clips",
                f"{len(facts)} of {self.rows}" + (f", {len(self.bad_rows)} bad" if self.problems else ""),
            ),
            (
                "length",
                f"{_seconds(min(seconds))} to {_seconds(max(seconds))}, {_seconds(sum(seconds))} together",
            ),
            ("frame rate", _counts(f"{fact.fps:g} fps" for fact in facts)),
            ("size", _counts(f"{_size(fact.source_size)} to {_size(fact.size)}" for fact in facts)),
            (
                "conditions",
                _counts([*(name for fact in facts for name in fact.conditions), *("none" for _ in bare)]),
            ),
            ("frames", _counts(f"{fact.frames} ({fact.policy})" for fact in facts)),
            (
                "tokens",
                _counts(str(fact.tokens) for fact in facts) + f"; {sum(f.tokens for f in facts)} together",
            ),
        ]
        remarks = [("remark", remark) for remark in _remarks(facts)] + [
            ("remark", note) for note in self.notes
        ]
        return "\n".join(f"{name:<12}{text}" for name, text in lines + remarks)


def check_dataset(
    data_path: str | Path,
    config: VideoConfig,
    *,
    data_folder: str | Path | None = None,
    skip_bad_samples: int = 0,
    or_else: str = "",
    report_path: Path | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
) -> CheckReport:
    """Read a manifest, check every clip and log a summary.

    Raises DataError if more than `skip_bad_samples` rows are bad. With `report_path`, the excluded rows are
    written to that file even if the error is raised.
    """
    manifest = scan_manifest(data_path, data_folder)
    report = check_manifest(manifest, config, workers=workers, timeout=timeout)
    for line in report.summary().split("\n"):
        logger.info(line)
    if report_path is not None and report.problems:
        report.write(report_path)
    report.enforce_error_budget(skip_bad_samples, or_else=or_else)
    for problem in report.problems[:20]:
        logger.warning("left out: %s", problem)
    if report.problems:
        location = f"; all of them: {report_path}" if report_path else ""
        logger.warning("%d of %d rows are left out%s", len(report.bad_rows), report.rows, location)
    return report


def check_manifest(
    manifest: Manifest | Sequence[SampleRecord],
    config: VideoConfig,
    *,
    workers: int | None = None,
    timeout: float = 60.0,
    memory: Path | None = None,
) -> CheckReport:
    """Open every clip, image and mask of the records, many in parallel.

    A file that takes longer than `timeout` seconds is bad. `workers=0` opens the files in this process,
    without a timeout. `memory` is a folder that caches the results of good files by size and timestamp. A
    cached file is opened again only after either has changed.
    """
    if not isinstance(manifest, Manifest):
        manifest = Manifest(tuple(manifest), (), (), len(manifest))
    workers = min(usable_cores(), len(manifest.records)) if workers is None else workers
    index = ClipIndex(memory)
    tasks = _row_tasks(manifest.records, index)
    known = [task for task in tasks if task.is_known]
    chunk = max(1, min(_CHUNK, (len(tasks) - len(known)) // (4 * max(workers, 1))))
    facts: list[ClipFacts] = []
    problems = list(manifest.problems)
    with ReadAhead(partial(check_row, config=config), num_workers=workers, timeout=timeout) as pool:
        fresh = pool.map((task for task in tasks if not task.is_known), chunk=chunk)
        unchanged = ((task, check_row(task, config)) for task in known)
        for task, found in chain(unchanged, _with_progress(fresh, len(tasks) - len(known))):
            if isinstance(found, DataError):
                problems.append(Problem(task.record.address, str(found), task.record.row))
                continue
            index.add(found.seen)
            problems.extend(found.problems)
            facts.extend([found.facts] if found.facts is not None else [])
    facts.sort(key=lambda fact: fact.row)
    bad = {problem.row for problem in problems}
    return CheckReport(
        rows=manifest.rows,
        records=tuple(record for record in manifest.records if record.row not in bad),
        facts=tuple(facts),
        problems=tuple(sorted(problems, key=lambda problem: problem.row)),
        notes=(*manifest.notes, *_notes_on(facts)),
    )


def _notes_on(facts: Sequence[ClipFacts]) -> list[str]:
    """Return notes on facts that matter only if all rows share them."""
    masked = [fact for fact in facts if any("mask" in name for name in fact.conditions)]
    if masked and all(fact.blank_mask == "everywhere" for fact in masked):
        return ["every mask is white everywhere: no pixel of src_video is kept; black = keep"]
    return []


def _row_tasks(records: Sequence[SampleRecord], index: ClipIndex) -> list[RowTask]:
    """Return a task for each row, with the cached facts about its files."""
    files = [[(file.kind, file.path) for file in record.files] for record in records]
    known = index.get_many(list(dict.fromkeys(chain.from_iterable(files))))
    return [
        RowTask(record, {file: known[file] for file in row if file in known})
        for record, row in zip(records, files, strict=True)
    ]


def _with_progress(rows: Iterator[T], count: int) -> Iterator[T]:
    """Yield `rows` and log the progress, because checking many clips on slow storage takes long."""
    with Progress("checking", count, "clip") as progress:
        for row in rows:
            progress.step()
            yield row


def _remarks(facts: Sequence[ClipFacts]) -> list[str]:
    counted = Counter(remark for fact in facts for remark in fact.remarks)
    return [f"{_clips(count)} with {remark}" for remark, count in counted.most_common()]


def _counts(words: Iterable[str], shown: int = 6) -> str:
    counted = Counter(words)
    text = ", ".join(f"{word}: {count}" for word, count in counted.most_common(shown))
    return text + (f", {len(counted) - shown} more kinds" if len(counted) > shown else "")


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
