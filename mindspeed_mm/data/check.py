"""Look at every clip of a dataset before any device is touched: what cannot be used and why, and what the rest will become. No torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TypeVar

from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.frames import align, choose, target_size, token_count
from mindspeed_mm.data.images import blank_mask, refuse_zero_one
from mindspeed_mm.data.manifest import Manifest, Problem, list_problems, scan_manifest
from mindspeed_mm.data.probe import ClipIndex, ClipInfo, Kind, Seen
from mindspeed_mm.data.probe import look as look_into
from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.threads import map_in_threads
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import write_json
from mindspeed_mm.log import get_logger
from mindspeed_mm.progress import Progress

logger = get_logger(__name__)
T = TypeVar("T")
_CHUNK = 16  # rows that a process gets at once: one takes about a millisecond


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """What one usable row is, and what becomes of it."""

    row: int
    fps: float
    seconds: float
    source_size: tuple[int, int]  # height, width
    size: tuple[int, int]
    frames: int
    policy: str
    tokens: int
    conditions: tuple[str, ...]  # of: src_video, mask, still mask, mask only, 1 reference, 2 references, …
    remarks: tuple[str, ...]
    blank_mask: str = ""  # nowhere, everywhere: where a mask of one value is white


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What the check found. `records` can be used; `problems` say why the others cannot."""

    rows: int
    records: tuple[SampleRecord, ...]
    facts: tuple[ClipFacts, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    @property
    def bad_rows(self) -> list[int]:
        """Rows with a problem."""
        return sorted({problem.row for problem in self.problems})

    def demand(self, skip_bad_samples: int) -> None:
        """Raise DataError, listing the problems, when more rows than `skip_bad_samples` are bad or none is good."""
        if len(self.bad_rows) > skip_bad_samples or not self.records:
            hint = (
                ""
                if skip_bad_samples >= self.rows
                else "; correct them, or go on without them: --skip-bad-samples N"
            )
            raise DataError(list_problems(self.problems, self.rows) + hint)

    def write(self, path: Path) -> None:
        """A JSON file that names every row that is left out, and why."""
        skipped = [{"row": p.row, "address": p.address, "problem": p.message} for p in self.problems]
        content = {
            "rows": self.rows,
            "usable": len(self.records),
            "skipped": skipped,
            "notes": list(self.notes),
        }
        write_json(path, content)

    def summary(self) -> str:
        """A table, one line for each thing one wants to know before starting."""
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
    report_path: Path | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
) -> CheckReport:
    """Read a manifest and look into every clip, tell what was found, and raise DataError if more rows than
    `skip_bad_samples` are bad. With `report_path`, the rows that are left out are written there in any case.
    """
    manifest = scan_manifest(data_path, data_folder)
    report = check_manifest(manifest, config, workers=workers, timeout=timeout)
    for line in report.summary().splitlines():
        logger.info(line)
    if report_path is not None and report.problems:
        report.write(report_path)
    report.demand(skip_bad_samples)
    for problem in report.problems[:20]:
        logger.warning("left out: %s", problem)
    if report.problems:
        logger.warning("%d of %d rows are left out%s", len(report.bad_rows), report.rows, f"; all of them: {report_path}" if report_path else "")  # fmt: skip
    return report


def check_manifest(
    manifest: Manifest | Sequence[SampleRecord],
    config: VideoConfig,
    *,
    workers: int | None = None,
    timeout: float = 60.0,
    memory: Path | None = None,
) -> CheckReport:
    """Open every clip, image and mask of the records, many at a time. A file that takes longer than `timeout` seconds is bad.

    `workers=0` looks in this process, without a time limit. With a folder as `memory`, good files are remembered there by size
    and time stamp, and opened again only when those have changed.
    """
    if not isinstance(manifest, Manifest):
        manifest = Manifest(tuple(manifest), (), (), len(manifest))
    workers = min(_cores(), len(manifest.records)) if workers is None else workers
    index = ClipIndex(memory)
    looks = _recall(manifest.records, index)
    known = [look for look in looks if look.is_known]
    chunk = max(1, min(_CHUNK, (len(looks) - len(known)) // (4 * max(workers, 1))))
    facts: list[ClipFacts] = []
    problems = list(manifest.problems)
    with ReadAhead(partial(look_at, config=config), num_workers=workers, timeout=timeout) as crew:
        fresh = crew.map((look for look in looks if not look.is_known), chunk=chunk)
        for look, found in chain(((look, look_at(look, config)) for look in known), _with_progress(fresh, len(looks) - len(known))):  # fmt: skip
            if isinstance(found, DataError):
                problems.append(Problem(look.record.address, str(found), look.record.row))
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
    """What is only remarkable when all rows have it."""
    masked = [fact for fact in facts if any("mask" in name for name in fact.conditions)]
    if masked and all(fact.blank_mask == "everywhere" for fact in masked):
        return ["every mask is white everywhere: nothing of src_video is kept; black = keep"]
    return []


@dataclass(frozen=True)
class Look:
    """One row to look at, and what its files are known to be."""

    record: SampleRecord
    known: Mapping[tuple[Kind, Path], ClipInfo]

    @property
    def is_known(self) -> bool:
        """Whether nothing has to be opened."""
        return all(file in self.known for file in _files(self.record))


@dataclass(frozen=True)
class Found:
    """What one row is, or everything that is wrong with it."""

    facts: ClipFacts | None
    problems: tuple[Problem, ...]
    seen: Seen  # the files that were opened and are good


def look_at(look: Look, config: VideoConfig) -> Found:
    """The facts of one row, or its problems."""
    record, seen = look.record, Seen()
    problems: list[Problem] = []

    def see(key: str, kind: Kind, path: Path | None) -> ClipInfo | None:
        return (
            None
            if path is None
            else _try(record, key, partial(look_into, kind, path, look.known, seen), problems)
        )

    video, source = see("video", "clip", record.video), see("src_video", "clip", record.src_video)
    mask = see("src_video_mask", "mask", record.src_mask)
    if mask is not None and mask.levels is not None:
        _try(record, "src_video_mask", partial(refuse_zero_one, mask.path, mask.levels[1]), problems)
    references = [
        see(f"src_ref_images[{place}]", "picture", path) for place, path in enumerate(record.src_ref_images)
    ]
    facts = (
        None
        if video is None
        else _try(record, "video", partial(_facts, record, video, source, mask, references, config), problems)
    )
    if video is not None and facts is not None:
        chosen = choose(video, config.policy)
        for key, other in (("src_video", source), ("src_video_mask", mask)):
            if other is not None:
                _try(record, key, partial(align, key, other, video, chosen), problems)
    return Found(None if problems else facts, tuple(problems), seen)


def _files(record: SampleRecord) -> Iterator[tuple[Kind, Path]]:
    yield from (("clip", path) for path in (record.video, record.src_video) if path is not None)
    yield from (("mask", path) for path in (record.src_mask,) if path is not None)
    yield from (("picture", path) for path in record.src_ref_images)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _recall(records: Sequence[SampleRecord], index: ClipIndex) -> list[Look]:
    """Looked up by many threads: on network storage each look takes its time."""

    def recall(record: SampleRecord) -> Look:
        known = {file: index.get(*file) for file in _files(record)}
        return Look(record, {file: info for file, info in known.items() if info is not None})

    return map_in_threads(recall, records)


def _with_progress(rows: Iterator[T], count: int) -> Iterator[T]:
    """Many clips on slow storage take a while."""
    with Progress("checking", count, "clip") as progress:
        for row in rows:
            progress.step()
            yield row


def _facts(
    record: SampleRecord,
    video: ClipInfo,
    source: ClipInfo | None,
    mask: ClipInfo | None,
    references: Sequence[ClipInfo | None],
    config: VideoConfig,
) -> ClipFacts:
    chosen = choose(video, config.policy)
    size = target_size(video.height, video.width, config.max_hxw)
    refs = len(record.src_ref_images)
    return ClipFacts(
        row=record.row,
        fps=video.fps if video.timed else config.train_fps,
        seconds=video.duration if video.timed else video.num_frames / config.train_fps,
        source_size=(video.height, video.width),
        size=size,
        frames=len(chosen.indices),
        policy=chosen.policy,
        tokens=token_count(len(chosen.indices), *size, refs),
        conditions=_conditions(source, mask, refs),
        remarks=(*_remarks_on(video, source, mask, config), *_traits_of((video, source, mask, *references))),
        blank_mask=_blank(mask, config),
    )


def _blank(mask: ClipInfo | None, config: VideoConfig) -> str:
    return "" if mask is None or mask.levels is None else blank_mask(mask.levels, soft=config.soft_mask)


def _traits_of(infos: Sequence[ClipInfo | None]) -> list[str]:
    """What is not honoured of a row's files, or guessed; each once."""
    return remarks_on(dict.fromkeys(trait for info in infos if info is not None for trait in info.traits))


def _conditions(source: ClipInfo | None, mask: ClipInfo | None, refs: int) -> tuple[str, ...]:
    names = [] if source is None else ["src_video"]
    if mask is not None:
        still = "still " if mask.num_frames == 1 else ""
        names.append(f"{still}mask" + ("" if source else " of the video itself"))
    return tuple(names + ([f"{refs} reference{'s' * (refs > 1)}"] if refs else []))


def _remarks_on(
    video: ClipInfo, source: ClipInfo | None, mask: ClipInfo | None, config: VideoConfig
) -> list[str]:
    remarks = []
    if _blank(mask, config) == "nowhere":
        remarks.append(
            "a mask that is white nowhere: nothing is generated, the branch learns to copy; white = generate"
        )
    if video.variable:
        remarks.append("a variable frame rate: frames are taken by their time")
    if video.timed and video.fps < 0.95 * config.train_fps:
        remarks.append(f"fewer frames a second than train_fps {config.train_fps:g}: frames are repeated")
    for name, other in (("src_video", source), ("mask", mask)):
        if other is not None and abs(other.width / other.height / (video.width / video.height) - 1) > 0.02:
            remarks.append(f"a {name} of another aspect than the video: its edges are cut differently")
    return remarks


def _try(record: SampleRecord, key: str, look: partial[T], problems: list[Problem]) -> T | None:
    """What `look` answers; what it raises becomes a problem with an address."""
    try:
        return look()
    except DataError as error:
        problems.append(Problem(f"{record.address}.{key}", str(error), record.row))
        return None


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
