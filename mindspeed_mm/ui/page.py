"""The page: three tabs in one language. All text from users and from the server is escaped."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mindspeed_mm.ui.actions import Actions
from mindspeed_mm.ui.config import Language
from mindspeed_mm.ui.make import Widgets, build_inputs
from mindspeed_mm.ui.queue import QueuePanel
from mindspeed_mm.ui.saved import build_saved
from mindspeed_mm.ui.service import Service
from mindspeed_mm.ui.tabs import build_curves, build_inspect
from mindspeed_mm.ui.text import Words

_FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Noto Sans",
    "Noto Sans CJK SC",
    "Microsoft YaHei",
    "sans-serif",
)


def theme() -> Any:
    """Return the theme. It uses system fonts, so that nothing is downloaded."""
    made = gr.themes.Default(
        primary_hue="orange", neutral_hue="slate", font=_FONTS, font_mono=("ui-monospace", "monospace")
    )
    return made.set(
        block_title_text_weight="600", block_label_text_weight="600", block_info_text_size="*text_xs"
    )


def build_page(lang: Language, service: Service) -> gr.Blocks:
    """Build the page in one language."""
    words = Words(lang)
    with gr.Blocks(title=words("title"), analytics_enabled=False, delete_cache=(3600, 7 * 86400)) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown(f"# {words('title')}")
            gr.HTML(
                '<a href="/en/" lang="en">English</a> <a href="/zh/" lang="zh">中文</a>',
                elem_id="lang",
            )
        with gr.Tabs():
            with gr.Tab(words("tab_make"), id="make", elem_id="tab-make"):
                _build_make(words, service)
            with gr.Tab(words("tab_inspect"), id="inspect", elem_id="tab-inspect"):
                build_inspect(words, service)
            with gr.Tab(words("tab_curves"), id="curves", elem_id="tab-curves"):
                build_curves(words, service)
    return page


def _build_make(words: Words, service: Service) -> None:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            sample = gr.Button(
                words("sample"), size="sm", visible=service.sample is not None, elem_id="sample"
            )
            widgets = build_inputs(words, service)
            with gr.Row():
                preview_button = gr.Button(words("preview"), elem_id="preview")
                run = gr.Button(words("run"), variant="primary", elem_id="run")
            message_box = gr.HTML(elem_id="said", padding=False)
            strip = gr.Image(
                label=words("strip"),
                show_label=False,
                visible=False,
                format="png",
                interactive=False,
                elem_id="strip",
                buttons=["fullscreen"],
            )
        with gr.Column(scale=4, min_width=320):
            queue = QueuePanel(words, service)
            saved = build_saved(words)
    actions = Actions(words, service, widgets)
    _wire(actions, widgets, sample, preview_button, run, message_box, strip)
    queue.wire(actions)
    saved.wire(actions, message_box)


def _wire(
    actions: Actions,
    widgets: Widgets,
    sample: Any,
    preview_button: Any,
    run: Any,
    message_box: Any,
    strip: Any,
) -> None:
    every = widgets.all
    shown = [
        *widgets.parts.values(),
        *widgets.groups.values(),
        *widgets.options.values(),
        *widgets.numbers.values(),
    ]
    forms = [widgets.form, *shown]
    part, quiet = widgets.parts, {"show_progress": "hidden"}
    widgets.family.input(actions.choose_family, every, forms, **quiet)
    widgets.form.input(actions.choose_task, every, forms, **quiet)
    for key, widget in widgets.options.items():
        if key.startswith("mode:"):
            widget.input(actions.choose_mode, every, shown, **quiet)
    part["video"].change(actions.take_video, every, shown, **quiet)
    part["images"].change(actions.take_images, every, [part["painter"], widgets.groups["paint"]], **quiet)
    part["frame"].release(actions.take_frame, every, [part["painter"], part["grower"]], **quiet)
    for side in ("left", "top", "right", "bottom"):
        part[side].release(actions.take_sides, every, shown, **quiet)
    sample.click(actions.take_sample, None, [part["video"], part["prompt"]], **quiet)
    preview_button.click(actions.preview, every, [strip, message_box])
    run.click(actions.run, every, [message_box])
