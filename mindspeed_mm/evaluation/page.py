"""One HTML page with the videos of several runs side by side. It needs no server and no network. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from mindspeed_mm.evaluation.report import Report, Scored
from mindspeed_mm.files import write_text

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 16px;
  color: #1b1b1b }}
h1 {{ font-size: 20px }} h2 {{ font-size: 16px; margin: 28px 0 6px; border-bottom: 1px solid #ddd }}
table {{ border-collapse: collapse; margin: 4px 0 }}
td, th {{ padding: 2px 12px 2px 0; text-align: left; font-weight: normal }}
th {{ color: #666 }} td.n {{ font-variant-numeric: tabular-nums }}
.prompt {{ color: #555; margin: 2px 0 6px }}
.row {{ display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 6px }}
figure {{ margin: 0; max-width: 100% }}
figcaption {{ color: #666 }}
video {{ display: block; width: 320px; max-width: 100%; background: #000; image-rendering: auto }}
details {{ margin: 4px 0 }} summary {{ cursor: pointer }}
button {{ font: inherit; padding: 3px 12px }}
</style></head><body>
<h1>{title}</h1>
<p><button id="play">Play all</button> <button id="start">Back to the start</button></p>
"""
_TAIL = """<script>
const videos = [...document.querySelectorAll('video')];
const rows = [...document.querySelectorAll('.row')];
let playing = false;
document.getElementById('play').onclick = event => {
  playing = !playing;
  event.target.textContent = playing ? 'Pause all' : 'Play all';
  videos.forEach(video => playing ? video.play() : video.pause());
};
document.getElementById('start').onclick = () => videos.forEach(video => { video.currentTime = 0 });
rows.forEach(row => row.querySelectorAll('video').forEach(video => {
  video.onseeked = () => { if (video.paused) row.querySelectorAll('video').forEach(other => {
    if (other !== video && Math.abs(other.currentTime - video.currentTime) > 0.02)
          other.currentTime = video.currentTime;
  }) };
}));
</script></body></html>
"""


def write_page(path: Path, names: Sequence[str], reports: Sequence[Report]) -> None:
    """A summary, then one row of players for each video: what was given, each run, the true clip.

    Raises OSError.
    """
    parts = [_HEAD.format(title=escape("vace eval: " + ", ".join(names)))]
    parts.append(_summary(names, reports))
    samples = [{sample.name: sample for sample in report.samples} for report in reports]
    order = sorted({(sample.task, sample.name) for report in reports for sample in report.samples})
    for task, name in order:
        parts.append(f"<h2>{escape(name)} <small>{escape(task)}</small></h2>")
        there = [found.get(name) for found in samples]
        first = next(sample for sample in there if sample is not None)
        if first.prompt:
            parts.append(f'<p class="prompt">{escape(first.prompt)}</p>')
        parts.append(_players(path, names, reports, there))
        parts.append(_scores(names, reports, there))
    write_text(path, "\n".join([*parts, _TAIL]))


def _players(
    page: Path, names: Sequence[str], reports: Sequence[Report], samples: Sequence[Scored | None]
) -> str:
    known = [
        (Path(report.folder), one) for report, one in zip(reports, samples, strict=True) if one is not None
    ]
    given = next((folder / sample.src_video for folder, sample in known if sample.src_video), None)
    truth = next((Path(sample.truth) for _, sample in known if sample.truth), None)
    figures = [_figure(page, given, "given")] if given else []
    for name, report, sample in zip(names, reports, samples, strict=True):
        if sample is not None:
            figures.append(_figure(page, Path(report.folder) / sample.video, name))
    figures += [_figure(page, truth, "true clip")] if truth else []
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(page: Path, video: Path, caption: str) -> str:
    address = quote(Path(os.path.relpath(video, page.parent)).as_posix())
    return (
        f'<figure><video src="{escape(address)}" controls loop muted playsinline preload="metadata"></video>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _scores(names: Sequence[str], reports: Sequence[Report], samples: Sequence[Scored | None]) -> str:
    metrics = list(dict.fromkeys(name for report in reports for name in report.metrics))
    rows = []
    for metric in metrics:
        values = [None if sample is None else sample.scores.get(metric) for sample in samples]
        if any(value is not None for value in values):
            cells = ["–" if value is None else f"{value:.3g}" for value in values]
            rows.append(_row([_title(metric, reports), *cells]))
    head = _row(["", *names], "th")
    return f"<details><summary>scores</summary><table>{head}{''.join(rows)}</table></details>"


def _summary(names: Sequence[str], reports: Sequence[Report]) -> str:
    means = [report.means() for report in reports]
    parts = []
    for task in dict.fromkeys(task for found in means for task in found):
        rows = [_row(["", *names], "th")]
        for metric in dict.fromkeys(name for found in means for name in found.get(task, {})):
            cells = []
            for found in means:
                mean = found.get(task, {}).get(metric)
                text = "–" if mean is None else f"{mean.mean:.3g}"
                if mean is not None and mean.low is not None:
                    text += f" [{mean.low:.3g}, {mean.high:.3g}]"
                cells.append(text)
            rows.append(_row([_title(metric, reports), *cells]))
        parts.append(f"<summary>{escape(task)}</summary><table>{''.join(rows)}</table></details>")
    opened = [f"<details>{part}" for part in parts[:-1]] + [f"<details open>{parts[-1]}"]
    return "\n".join(reversed(opened))


def _title(metric: str, reports: Sequence[Report]) -> str:
    info = next(report.metrics[metric] for report in reports if metric in report.metrics)
    words = [info.unit, f"{info.better} is better" if info.better else ""]
    said = ", ".join(word for word in words if word)
    return f"{metric} ({said})" if said else metric


def _row(cells: Sequence[str], tag: str = "td") -> str:
    kind = ' class="n"' if tag == "td" else ""
    return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
