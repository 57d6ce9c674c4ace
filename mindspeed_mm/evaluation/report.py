"""The scores of a results folder: measures them, writes and reads eval.json, and compares two folders."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.evaluation.measured import Measured, files_checksum
from mindspeed_mm.evaluation.results import Result, find_results, read_sample
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.sources import EvalData
from mindspeed_mm.evaluation.spec import Better, Metric
from mindspeed_mm.evaluation.stats import Mean, mean_of, paired
from mindspeed_mm.files import display_path, read_json_object, write_json
from mindspeed_mm.progress import Progress

FILE_NAME = "eval.json"
ALL = "all tasks"


class Scored(Config):
    """The scores of one video. Metrics that do not apply are left out."""

    name: str
    task: str
    prompt: str = ""
    video: str  # path relative to the results folder
    src_video: str | None = None  # for the page, relative to the results folder
    references: tuple[str, ...] = ()  # for the page, relative to the results folder
    truth: str | None = None  # for the page, an absolute path
    scores: dict[str, float]


class MetricInfo(Config):
    """The unit and direction of a metric, stored with its scores."""

    unit: str = ""
    better: Literal["higher", "lower", ""] = ""


class Report(Config):
    """The content of eval.json without the means, which are computed from it."""

    version: Literal[1] = 1
    folder: str
    metrics: dict[str, MetricInfo]
    samples: tuple[Scored, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    measured: Measured = Measured()

    def values(self, task: str) -> dict[str, dict[str, float]]:
        """Return metric → video → score, for one task or for ALL."""
        found: dict[str, dict[str, float]] = {}
        for sample in self.samples:
            if task in (ALL, sample.task):
                for name, score in sample.scores.items():
                    found.setdefault(name, {})[sample.name] = score
        return {name: found[name] for name in self.metrics if name in found}

    @property
    def tasks(self) -> list[str]:
        """The tasks, sorted by name."""
        return sorted({sample.task for sample in self.samples})

    def means(self) -> dict[str, dict[str, Mean]]:
        """Return task → metric → mean over the videos. If there are several tasks, ALL is included."""
        groups = [*self.tasks, ALL] if len(self.tasks) > 1 else self.tasks
        return {
            task: {name: mean_of(list(scores.values())) for name, scores in self.values(task).items()}
            for task in groups
        }


@dataclass(frozen=True)
class Difference:
    """The difference of two runs in one metric, over the videos that both contain."""

    task: str
    metric: str
    unit: str
    first: float
    second: float
    change: Mean  # second - first
    better: Better

    @property
    def verdict(self) -> str:
        """The conclusion that the interval supports."""
        if not self.change.differs:
            return "no difference shown"
        if not self.better:
            return "higher" if self.change.mean > 0 else "lower"
        return "better" if (self.change.mean > 0) == (self.better == "higher") else "worse"


def score_folder(
    folder: Path,
    metrics: Sequence[Metric],
    *,
    data: EvalData | None = None,
    task: str = "",
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Report:
    """Score every video in a folder.

    `options` override the task options of each video. Raises DataError if nothing can be scored.
    """
    found, scored, notes = find_results(folder), [], Counter[str]()
    unknown: list[str] = []
    with Progress(f"{folder.name}: scoring", len(found), "video", shown=None if progress else False) as bar:
        for result in found:
            sample = read_sample(result, data, task)
            if sample is None:
                unknown.append(result.name)
            else:
                if options:
                    sample = with_options(sample, options)
                scored.append(_scored(folder, result, sample, data, score(sample, metrics, notes)))
            bar.step()
    if not scored:
        raise DataError(
            f"contains {len(unknown)} videos without settings ({unknown[0]}.mp4, …)",
            where=display_path(folder),
            expected="NAME.json next to NAME.mp4",
            fix="keep the settings with the videos, or pass the data that they were generated from",
        )
    if unknown:
        notes[
            f"{len(unknown)} videos without settings or inputs are left out: {', '.join(unknown[:3])} …"
        ] = 1
    counted = tuple(note if count == 1 else f"{note} ({count} videos)" for note, count in notes.items())
    infos = {metric.name: MetricInfo(unit=metric.unit, better=metric.better) for metric in metrics}
    measured = Measured(files=files_checksum(found), task=task)
    return Report(folder=str(folder), metrics=infos, samples=tuple(scored), notes=counted, measured=measured)


def score(sample: Sample, metrics: Sequence[Metric], notes: Counter[str] | None = None) -> dict[str, float]:
    """Return metric → score for the metrics that apply.

    A missing network or a score that is not finite becomes a note. Without `notes`, a missing network raises
    ConfigError.
    """
    found = {}
    for metric in metrics:
        try:
            value = metric.measure(sample)
        except ConfigError as error:
            if notes is None:
                raise
            notes[f"{metric.name}: {error}"] += 1
            continue
        if value is None:
            continue
        if math.isfinite(value):
            found[metric.name] = float(value)
        elif notes is not None:
            notes[f"{metric.name}: a score that is not finite is left out"] += 1
    return found


def with_options(sample: Sample, options: Mapping[str, Any]) -> Sample:
    """Return the sample with `options` added to the options of its task, or replacing them."""
    return replace(sample, options={**sample.options, **options})


def write_report(report: Report, path: Path) -> None:
    """Write eval.json: the scores of each video, and the means and intervals of each task."""
    means = {
        task: {name: mean.to_json() for name, mean in found.items()} for task, found in report.means().items()
    }
    write_json(path, {**report.model_dump(mode="json"), "tasks": means})


def read_report(path: Path) -> Report:
    """Read an eval.json. Raises DataError for a file with different content."""
    values = read_json_object(path, DataError)
    values.pop("tasks", None)
    try:
        return parse(Report, values, str(path))
    except ConfigError as error:
        raise DataError(
            f"is not an {FILE_NAME} of this version: {error.problem}",
            where=display_path(path),
            fix="remove it, and run vace eval again",
        ) from None


def compare(first: Report, second: Report) -> list[Difference]:
    """Compare each metric over the videos that share a name. Raises DataError if there are none."""
    names = {sample.name for sample in first.samples} & {sample.name for sample in second.samples}
    if not names:
        raise DataError(
            f"{second.folder} and {first.folder} contain no videos of the same name",
            expected="results of the same requests",
        )
    return [found for task in _shared_tasks(first, second) for found in _differences(first, second, task)]


def _shared_tasks(first: Report, second: Report) -> list[str]:
    tasks = [task for task in first.tasks if task in second.tasks]
    return tasks if len(tasks) == 1 else [*tasks, ALL]


def _differences(first: Report, second: Report, task: str) -> Iterator[Difference]:
    before, after = first.values(task), second.values(task)
    for name, scores in before.items():
        both = [video for video in scores if video in after.get(name, {})]
        if both:
            left, right = [scores[video] for video in both], [after[name][video] for video in both]
            info = first.metrics[name]
            change = paired(left, right)
            means = sum(left) / len(left), sum(right) / len(right)
            yield Difference(task, name, info.unit, *means, change, info.better)


def _scored(
    folder: Path, result: Result, sample: Sample, data: EvalData | None, scores: dict[str, float]
) -> Scored:
    source = result.folder / "src_video.mp4"
    case = data.find(result.name, result.inputs, result.prompt) if data is not None else None
    truth = case.truth if case is not None and sample.truth is not None else None
    return Scored(
        name=result.name,
        task=sample.task,
        prompt=sample.prompt,
        video=result.video.relative_to(folder).as_posix(),
        src_video=source.relative_to(folder).as_posix() if source.is_file() else None,
        references=tuple(path.relative_to(folder).as_posix() for path in result.references),
        truth=os.path.abspath(truth) if truth is not None else None,
        scores=scores,
    )


def grouped(differences: Sequence[Difference]) -> dict[str, list[Difference]]:
    """Group differences by task, and keep their order."""
    found: dict[str, list[Difference]] = defaultdict(list)
    for difference in differences:
        found[difference.task].append(difference)
    return dict(found)
