"""The tabs that inspect a dataset or features and that plot a run's curves.

They read only files inside one folder.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.tools.inspect_samples import InspectConfig, draw, locate
from mindspeed_mm.ui.curves import read_curves, smoothed, thinned
from mindspeed_mm.ui.places import find, inside
from mindspeed_mm.ui.service import Service
from mindspeed_mm.ui.text import Words
from mindspeed_mm.ui.videos import notice

_DATA = frozenset({"data.jsonl", "data.txt", "data.json", "metadata.csv"})
_METRICS = frozenset({"metrics.jsonl"})
_DEFAULT_CURVES = ("loss", "validation/loss")
_REFRESH_SECONDS = 10.0


def build_inspect(words: Words, service: Service) -> None:
    """Build the tab with the contact sheet of a row."""
    root = service.root.resolve()
    gr.Markdown(words("inspect_hint", {"root": f"`{root}`"}))
    with gr.Row(equal_height=False):
        path = gr.Dropdown(
            choices=find(root, _DATA),
            value=None,
            allow_custom_value=True,
            label=words("path"),
            scale=4,
            elem_id="inspect-path",
        )
        row = gr.Number(
            value=0, precision=0, minimum=0, label=words("row"), min_width=100, elem_id="inspect-row"
        )
        every = gr.Checkbox(label=words("every_row"), min_width=160, elem_id="inspect-every")
    with gr.Row():
        refresh_button = gr.Button(words("refresh"), size="sm", elem_id="inspect-again")
        draw_button = gr.Button(words("inspect"), variant="primary", size="sm", elem_id="inspect-draw")
    message_box = gr.HTML(elem_id="inspect-said", padding=False)
    sheet = gr.Image(
        interactive=False,
        visible=False,
        format="png",
        show_label=False,
        elem_id="inspect-sheet",
        buttons=["fullscreen", "download"],
    )

    def run(text: str | None, number: float | None, whole: bool) -> tuple[Any, str]:
        try:
            place = locate(inside(root, text or ""))
            inside(root, str(place))  # a folder may contain a link to a path outside it
            config = InspectConfig(index=None if whole else int(number or 0))
            image, what = draw(place, config)
        except MindSpeedMMError as error:
            return gr.update(visible=False), notice(str(error), bad=True)
        return gr.update(visible=True, value=image), notice(what)

    draw_button.click(run, [path, row, every], [sheet, message_box], concurrency_limit=1)
    refresh_button.click(lambda: gr.update(choices=find(root, _DATA)), None, [path], show_progress="hidden")


def build_curves(words: Words, service: Service) -> None:
    """Build the tab with the curves of a run."""
    root = service.root.resolve()
    gr.Markdown(words("curves_hint", {"root": f"`{root}`"}))
    with gr.Row():
        path = gr.Dropdown(
            choices=find(root, _METRICS),
            value=None,
            allow_custom_value=True,
            label=words("metrics"),
            scale=3,
            elem_id="curves-path",
        )
        names = gr.Dropdown(
            choices=[], multiselect=True, label=words("curve_names"), scale=3, elem_id="curves-names"
        )
        smooth = gr.Slider(0, 0.99, 0, step=0.01, label=words("smoothing"), scale=2, elem_id="curves-smooth")
    with gr.Row():
        refresh_button = gr.Button(words("refresh"), size="sm", elem_id="curves-again")
        follow = gr.Checkbox(label=words("follow"), min_width=160, elem_id="curves-follow")
        draw_button = gr.Button(words("draw"), variant="primary", size="sm", elem_id="curves-draw")
    message_box = gr.HTML(elem_id="curves-said", padding=False)
    plot = gr.LinePlot(
        x="iteration",
        y="value",
        color="curve",
        height=420,
        visible=False,
        show_label=False,
        elem_id="curves-plot",
    )
    timer = gr.Timer(_REFRESH_SECONDS, active=False)

    def run(text: str | None, chosen: list[str] | None, smoothing: float) -> tuple[Any, Any, str]:
        try:
            curves = read_curves(inside(root, text or ""))
        except MindSpeedMMError as error:
            return gr.update(visible=False), gr.skip(), notice(str(error), bad=True)
        known = sorted(curves)
        selected = [name for name in chosen or () if name in curves]
        selected = selected or [name for name in _DEFAULT_CURVES if name in curves] or known[:1]
        rows = [
            (iteration, value, name)
            for name in selected
            for iteration, value in thinned(smoothed(curves[name], float(smoothing)))
        ]
        return gr.update(value=_table(rows), visible=True), gr.update(choices=known, value=selected), ""

    inputs, outputs = [path, names, smooth], [plot, names, message_box]
    draw_button.click(run, inputs, outputs)
    path.input(lambda text, smoothing: run(text, None, smoothing), [path, smooth], outputs)
    names.input(run, inputs, outputs, show_progress="hidden")
    smooth.release(run, inputs, outputs, show_progress="hidden")
    refresh_button.click(
        lambda: gr.update(choices=find(root, _METRICS)), None, [path], show_progress="hidden"
    )
    follow.input(lambda on: gr.Timer(active=on), [follow], [timer], show_progress="hidden")
    timer.tick(run, inputs, outputs, show_progress="hidden")


def _table(rows: list[tuple[int, float, str]]) -> Any:
    import pandas

    return pandas.DataFrame(rows, columns=["iteration", "value", "curve"])
