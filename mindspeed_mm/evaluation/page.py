"""Writes an HTML page with the videos of several runs side by side. Needs no server or network. No torch."""

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
:root {{ color-scheme: light dark;
  --faint: light-dark(#666, #a5a5a5); --line: light-dark(#ddd, #444) }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 0 16px 32px;
  color: light-dark(#1b1b1b, #e8e8e8); background: light-dark(#fff, #1a1a1a) }}
header {{ position: sticky; top: 0; z-index: 1; background: inherit; padding: 8px 0;
  display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline;
  border-bottom: 1px solid var(--line) }}
h1 {{ font-size: 18px; margin: 0 }} h2 {{ font-size: 16px; margin: 28px 0 2px }}
h2 small {{ font-weight: normal; color: var(--faint); margin-left: 8px }}
table {{ border-collapse: collapse; margin: 4px 0 }}
td, th {{ padding: 2px 16px 2px 0; text-align: left; font-weight: normal }}
tr + tr {{ border-top: 1px solid var(--line) }}
th, .prompt, .hint, figcaption {{ color: var(--faint) }}
td.n {{ font-variant-numeric: tabular-nums }}
.prompt {{ margin: 2px 0 6px; max-width: 100ch }}
.row {{ display: flex; flex-wrap: wrap; gap: 12px; margin-bottom: 6px }}
figure {{ margin: 0; flex: 1 1 220px; max-width: 320px }} figure:has(img) {{ flex: 0 1 150px }}
video, img {{ display: block; width: 100%; background: #000; border-radius: 4px }}
video {{ cursor: pointer }}
details {{ margin: 4px 0; overflow-x: auto }} summary {{ cursor: pointer }}
button {{ font: inherit; padding: 3px 12px }}
</style></head><body>
<header><h1>{title}</h1>
<span><button id="play">Play all</button> <button id="start">Back to the start</button></span>
<span class="hint">A click on a video plays its row.</span></header>
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
rows.forEach(row => {
  const all = [...row.querySelectorAll('video')];
  all.forEach(video => {
    video.controls = false;  // shown only on hover or focus, because they would cover a small video
    video.tabIndex = 0;
    const show = shown => { if (video.controls !== shown) video.controls = shown };
    video.onpointerenter = video.onfocus = () => show(true);
    video.onpointerleave = video.onblur = () => show(document.activeElement === video);
    video.onclick = event => {
      event.preventDefault();  // replaces the player's click handler, which affects only this video
      const stopped = video.paused;
      all.forEach(one => {
        if (stopped) { one.currentTime = video.currentTime; one.play() } else one.pause();
      });
    };
    video.onseeked = () => { if (video.paused) all.forEach(other => {
      if (other !== video && Math.abs(other.currentTime - video.currentTime) > 0.02)
        other.currentTime = video.currentTime;
    }) };
  });
});
</script></body></html>
"""


def write_page(path: Path, names: Sequence[str], reports: Sequence[Report]) -> None:
    """Write a summary, then a row of players for each video: its inputs, each run, and the true clip.

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
    pictures = next(([folder / name for name in sample.references] for folder, sample in known), [])
    figures = [_figure(page, given, "given")] if given else []
    figures += [_picture(page, picture) for picture in pictures]
    for name, report, sample in zip(names, reports, samples, strict=True):
        if sample is not None:
            figures.append(_figure(page, Path(report.folder) / sample.video, name))
    figures += [_figure(page, truth, "true clip")] if truth else []
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(page: Path, video: Path, caption: str) -> str:
    return (
        f'<figure><video src="{_address(page, video)}" controls loop muted playsinline preload="metadata">'
        f"</video><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _picture(page: Path, picture: Path) -> str:
    return (
        f'<figure><img src="{_address(page, picture)}" alt="reference" loading="lazy">'
        "<figcaption>reference</figcaption></figure>"
    )


def _address(page: Path, file: Path) -> str:
    return escape(quote(Path(os.path.relpath(file, page.parent)).as_posix()))


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
    details = ", ".join(word for word in words if word)
    return f"{metric} ({details})" if details else metric


def _row(cells: Sequence[str], tag: str = "td") -> str:
    kind = ' class="n"' if tag == "td" else ""
    return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
