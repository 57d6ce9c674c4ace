"""Widgets for the inputs of a video: the task, then its inputs. The event handlers are in actions.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mindspeed_mm.conditioning.annotate.opencv import Frame
from mindspeed_mm.config.names import names_of
from mindspeed_mm.generation.sampling_config import Numbers
from mindspeed_mm.ui.forms import FAMILIES, Form, Option, forms
from mindspeed_mm.ui.mask import frame_url, paintable, painted_mask
from mindspeed_mm.ui.request import NUMBERS, WINDOWS, Filled, lines_of, number_of, text_of
from mindspeed_mm.ui.service import Service
from mindspeed_mm.ui.text import Words

_CHOICES = {"preset", "solver", "short_clip", "window_mode", "window_colors"}
MAIN = ("width", "height", "num_frames", "steps", "seed")
Data = Mapping[Any, Any]


@dataclass(frozen=True)
class Widgets:
    """The input widgets of the tab, by name."""

    family: gr.Radio
    form: gr.Dropdown
    parts: dict[str, Any]
    numbers: dict[str, Any]
    options: dict[str, Any]  # Option.key → widget
    groups: dict[str, Any]  # widgets that are shown or hidden together

    @property
    def all(self) -> set[Any]:
        """All input widgets. Every handler receives them."""
        widgets = (*self.parts.values(), *self.numbers.values(), *self.options.values())
        return {self.family, self.form, *widgets}

    def read(self, data: Data) -> Filled:
        """Convert the values of the widgets to the inputs of a request."""
        part = {name: data[widget] for name, widget in self.parts.items()}
        form = forms()[data[self.form]]
        options = {option.name: data[self.options[option.key]] for option in form.options}
        images = part["images"] or []
        return Filled(
            form=form.name,
            prompt=part["prompt"] or "",
            negative_prompt=(part["negative"] or "").strip() or None,
            numbers={name: number_of(data[widget]) for name, widget in self.numbers.items()},
            options=options,
            sides=(part["left"], part["top"], part["right"], part["bottom"]),
            video=_path(part["video"]),
            mask=_path(part["mask_file"]),
            images=tuple(Path(str(item)) for item in images),
            first=_path(part["first"]),
            last=_path(part["last"]),
            painted=painted_mask(part["painted"]),
            frame=int(part["frame"] or 0),
            grow=float(part["grow"] or 0),
            window_prompts=lines_of(part["window_prompts"]),
            window_references=lines_of(part["window_references"]),
        )


def painter(words: Words, frame: Frame) -> str:
    """Return the HTML of a frame and the painting tools, which painter.js turns into a canvas."""
    image = paintable(frame)
    height, width = image.shape[:2]
    tools = "".join(
        f'<button type="button" data-tool="{name}" aria-pressed="{str(name == "brush").lower()}">'
        f"{escape(words(name))}</button>"
        for name in ("brush", "eraser", "undo", "clear")
    )
    return (
        f'<div class="painter"><div class="painter-tools">{tools}<label>{escape(words("brush_size"))} '
        f'<input type="range" min="6" max="160" value="56"></label></div>'
        f'<div class="painter-area" style="aspect-ratio:{width}/{height}">'
        f'<img alt="" src="{frame_url(image)}">'
        f'<canvas width="{width}" height="{height}"></canvas></div></div>'
    )


def grower(frame: Frame) -> str:
    """Return the HTML from which grower.js makes a draggable border around the frame."""
    image = paintable(frame)
    height, width = image.shape[:2]
    corners = ("left top", "right top", "left bottom", "right bottom")
    handles = "".join(
        f'<span data-sides="{sides}"></span>' for sides in ("left", "top", "right", "bottom", *corners)
    )
    return (
        f'<div class="grower"><div class="grower-area" style="aspect-ratio:{width}/{height}">'
        f'<img alt="" src="{frame_url(image)}"><div class="grower-frame">{handles}</div></div>'
        '<div class="grower-text"></div></div>'
    )


def _path(value: Any) -> Path | None:
    return None if not value else Path(str(value))


def build_inputs(words: Words, service: Service) -> Widgets:
    """Lay out the inputs. The chosen task determines which are visible."""
    first = forms()["inpainting"]
    parts: dict[str, Any] = {}
    family = gr.Radio(
        choices=[(words(f"family_{name}"), name) for name in FAMILIES],
        value=first.family,
        label=words("goal"),
        elem_id="family",
    )
    form = gr.Dropdown(
        choices=form_choices(words, first.family), value=first.name, label=words("task"), elem_id="task"
    )
    with gr.Row(equal_height=True):
        parts["video"] = gr.Video(
            label=words("video"), sources=["upload"], elem_id="video", height=260, min_width=240
        )
        parts["mask_file"] = gr.File(
            label=words("mask_file"),
            file_types=["video", "image"],
            visible=False,
            height=260,
            elem_id="mask-file",
        )
        parts["images"] = gr.File(
            label=words("images"), file_types=["image"], file_count="multiple", height=260, elem_id="images",
            min_width=200,
        )  # fmt: skip
        parts["first"] = gr.File(label=words("first"), visible=False, height=160, elem_id="first")
        parts["last"] = gr.File(label=words("last"), visible=False, height=160, elem_id="last")
    with gr.Group(visible=False) as paint:
        gr.Markdown(f"**{words('paint')}** · {words('paint_hint')}", padding=True)
        parts["painter"] = gr.HTML(padding=True, elem_id="painter")
        parts["painted"] = gr.Textbox(elem_id="painted", elem_classes="hidden-box", show_label=False)
        with gr.Row():
            parts["frame"] = gr.Slider(0, 16, 0, step=1, label=words("frame"), elem_id="frame")
            parts["grow"] = gr.Slider(-20, 20, 0, step=1, label=words("grow"), elem_id="grow")
    with gr.Group(visible=False) as sides:
        parts["grower"] = gr.HTML(padding=True, elem_id="grower")
        with gr.Row():
            for side in ("left", "top", "right", "bottom"):
                parts[side] = gr.Slider(
                    0, 100, 25, step=1, label=words(f"side_{side}"), min_width=140, elem_id=f"side-{side}"
                )
    options = _option_widgets(words, first)
    parts["prompt"] = gr.Textbox(label=words("prompt"), lines=2, elem_id="prompt")
    with gr.Accordion(words("advanced"), open=False, elem_id="advanced"):
        numbers = _number_widgets(words, service.defaults(), NUMBERS)
        parts["negative"] = gr.Textbox(label=words("negative"), lines=2, elem_id="negative")
    with gr.Accordion(words("long"), open=False, elem_id="long"):
        gr.Markdown(words("long_hint"))
        numbers |= _number_widgets(words, service.defaults(), WINDOWS)
        for name in ("window_prompts", "window_references"):
            parts[name] = gr.Textbox(
                label=words(name), info=words(f"{name}_hint"), lines=3, elem_id=name.replace("_", "-")
            )
    return Widgets(family, form, parts, numbers, options, {"paint": paint, "sides": sides})


def form_choices(words: Words, family: str) -> list[tuple[str, str]]:
    """Return the tasks of a family as pairs (label, name)."""
    found = []
    for form in forms().values():
        if form.family == family:
            summary = words.task(form.name, form.summary)
            needs = form.task.network if form.task else ""
            more = f" ({words('needs_network', {'name': needs})})" if needs else ""
            found.append(
                (f"{summary}{more}" if form.task is None else f"{form.name} — {summary}{more}", form.name)
            )
    return found


def _option_widgets(words: Words, first: Form) -> dict[str, Any]:
    """Make one widget for each distinct option key of all tasks."""
    widgets: dict[str, Any] = {}
    known: dict[str, Option] = {}
    for form in forms().values():
        for option in form.options:
            known.setdefault(option.key, option)
    # The mode comes first, because it determines the other options.
    known = dict(sorted(known.items(), key=lambda item: item[1].name != "mode"))
    of_first = {option.key: option for option in first.options}
    mode = str(next(option.default for option in first.options if option.name == "mode"))
    with gr.Row():
        for key, option in known.items():
            usual = of_first.get(key, option)
            visible = key in of_first and first.shown(usual, mode)
            widgets[key] = _widget(usual, words, visible=visible)
    return widgets


def _widget(option: Option, words: Words, *, visible: bool) -> Any:
    common: dict[str, Any] = {
        "label": option.name,
        "info": words.option(option.name, option.description),
        "visible": visible,
        "min_width": 220,
        "elem_id": f"option-{option.name}-{option.kind}",
    }
    if option.kind == "choice":
        return gr.Dropdown(choices=list(option.choices), value=option.default, **common)
    if option.kind == "words":
        return gr.CheckboxGroup(choices=list(option.choices), value=option.default, **common)
    if option.kind == "switch":
        return gr.Checkbox(value=bool(option.default), **common)
    if option.kind == "number":
        return gr.Number(value=option.default, precision=0 if option.whole else None, **common)
    return gr.Textbox(value=option.default, **common)


def _number_widgets(words: Words, defaults: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    schema = Numbers.model_fields
    with gr.Row():
        for name in names:
            label = words(f"number_{name}")
            value, place = defaults.get(name), {"min_width": 130, "elem_id": f"number-{name}"}
            if name in _CHOICES:
                usual = "usual" if name in WINDOWS else "by_preset"
                known = [("wan" if name == "preset" else words(usual), "")]
                choices = known + [(text, text) for text in names_of(schema[name]) if text != "wan"]
                found[name] = gr.Dropdown(choices=choices, value=value or "", label=label, **place)
            else:
                found[name] = _number_widget(name, value, label, place)
    return found


def _number_widget(name: str, value: Any, label: str, place: Mapping[str, Any]) -> Any:
    """Return a number widget, or a textbox if the number may be empty, which gr.Number reads as 0."""

    if name not in MAIN:
        return gr.Textbox(value=text_of(value), label=label, max_lines=1, **place)
    usual = Numbers.model_fields[name].default
    return gr.Number(value=usual if value is None else value, label=label, precision=0, **place)
