"""Checks one row of a dataset: returns the facts about its files, or everything wrong with them.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.content import Seen, probe_cached
from mindspeed_mm.data.frames import align, choose, target_size
from mindspeed_mm.data.images import blank_mask, reject_zero_one
from mindspeed_mm.data.manifest_row import Problem
from mindspeed_mm.data.probe import ClipInfo
from mindspeed_mm.data.sample import Kind, SampleRecord
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.errors import DataError
from mindspeed_mm.geometry import WAN

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ClipFacts:
    """Facts about one usable row and the sample made from it."""

    row: int
    fps: float
    seconds: float
    source_size: tuple[int, int]  # height, width
    size: tuple[int, int]
    frames: int
    policy: str
    tokens: int
    conditions: tuple[str, ...]  # src_video, mask, still mask, mask only, 1 reference, 2 references, …
    remarks: tuple[str, ...]
    blank_mask: str = ""  # `nowhere` or `everywhere`: where a mask of a single value is white


@dataclass(frozen=True)
class RowTask:
    """One row to check, with the cached facts about its files."""

    record: SampleRecord
    known: Mapping[tuple[Kind, Path], ClipInfo]

    @property
    def is_known(self) -> bool:
        """Whether all facts are cached, so that no file has to be opened."""
        return all((file.kind, file.path) in self.known for file in self.record.files)


@dataclass(frozen=True)
class RowResult:
    """Result of checking one row: its facts, or everything that is wrong with it."""

    facts: ClipFacts | None
    problems: tuple[Problem, ...]
    seen: Seen  # good files that were opened


def check_row(task: RowTask, config: VideoConfig) -> RowResult:
    """Check one row and return its facts or its problems."""
    record, seen = task.record, Seen()
    problems: list[Problem] = []

    def probe_file(key: str, kind: Kind, path: Path | None) -> ClipInfo | None:
        return (
            None
            if path is None
            else _try(record, key, partial(probe_cached, kind, path, task.known, seen), problems)
        )

    video = probe_file("video", "clip", record.video)
    source = probe_file("src_video", "clip", record.src_video)
    mask = probe_file("src_video_mask", "mask", record.src_mask)
    if mask is not None and mask.levels is not None:
        _try(record, "src_video_mask", partial(reject_zero_one, mask.path, mask.levels[1]), problems)
    references = [
        probe_file(f"src_ref_images[{index}]", "picture", path)
        for index, path in enumerate(record.src_ref_images)
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
    return RowResult(None if problems else facts, tuple(problems), seen)


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
        tokens=WAN.tokens(len(chosen.indices), *size, refs),
        conditions=_conditions(source, mask, refs),
        remarks=(*_remarks_on(video, source, mask, config), *_traits_of((video, source, mask, *references))),
        blank_mask=_blank(mask, config),
    )


def _blank(mask: ClipInfo | None, config: VideoConfig) -> str:
    return "" if mask is None or mask.levels is None else blank_mask(mask.levels, soft=config.soft_mask)


def _traits_of(infos: Sequence[ClipInfo | None]) -> list[str]:
    """Return remarks on how a row's files are read, without duplicates."""
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
            "a mask that is white nowhere: nothing is generated, so the branch only learns to copy; "
            "white = generate"
        )
    if video.variable:
        remarks.append("a variable frame rate: frames are selected by time")
    if video.timed and video.fps < 0.95 * config.train_fps:
        remarks.append(f"a frame rate below train_fps {config.train_fps:g}: frames are repeated")
    for name, other in (("src_video", source), ("mask", mask)):
        if other is not None and abs(other.width / other.height / (video.width / video.height) - 1) > 0.02:
            remarks.append(f"a {name} whose aspect ratio differs from the video: it is cropped differently")
    return remarks


def _try(record: SampleRecord, key: str, function: partial[T], problems: list[Problem]) -> T | None:
    """Call `function` and return its result. Appends a problem and returns None on a DataError."""
    try:
        return function()
    except DataError as error:
        problems.append(Problem(f"{record.address}.{key}", str(error), record.row))
        return None
