"""Formats scores and comparisons as tables of text. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm.evaluation.report import Difference, Report, grouped
from mindspeed_mm.evaluation.stats import MIN_VALUES, Mean


def score_table(names: Sequence[str], reports: Sequence[Report]) -> str:
    """Return one table per task, with a row per metric and a column per folder."""
    means = [report.means() for report in reports]
    tasks = list(dict.fromkeys(task for found in means for task in found))
    lines = []
    for task in tasks:
        metrics = list(dict.fromkeys(name for found in means for name in found.get(task, {})))
        rows = []
        for metric in metrics:
            info = next(report.metrics[metric] for report in reports if metric in report.metrics)
            cells = [_cell(found.get(task, {}).get(metric), info.unit) for found in means]
            rows.append([f"{metric}{_ARROWS[info.better]}", *cells])
        lines += ["", *_aligned([[task, *names], *rows])]
    few = any(mean.low is None for found in means for row in found.values() for mean in row.values())
    if few:
        lines += ["", f"without an interval: fewer than {MIN_VALUES} videos"]
    return "\n".join(lines[1:])


def comparison_table(first: str, second: str, differences: Sequence[Difference]) -> str:
    """Return one table per task, with both means, the difference and its interval, and the verdict."""
    lines: list[str] = []
    for task, found in grouped(differences).items():
        rows = [[task, first, second, "difference", f"{second} is"]]
        for one in found:
            rows.append(
                [
                    f"{one.metric}{_ARROWS[one.better]}",
                    _number(one.first, one.unit),
                    _number(one.second, one.unit),
                    _interval(one.change),
                    one.verdict,
                ]
            )
        lines += ["", *_aligned(rows)]
    return "\n".join(lines[1:])


_ARROWS = {"higher": " (+)", "lower": " (-)", "": ""}


def _cell(mean: Mean | None, unit: str) -> str:
    if mean is None:
        return "-"
    if mean.low is None or mean.high is None:
        return _number(mean.mean, unit)
    return f"{_number(mean.mean, unit)} [{mean.low:.3g}, {mean.high:.3g}]"


def _interval(change: Mean) -> str:
    if change.low is None or change.high is None:
        return f"{change.mean:+.3g} ({change.count} pairs; {MIN_VALUES} are needed)"
    return f"{change.mean:+.3g} [{change.low:+.3g}, {change.high:+.3g}]"


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
