"""Widgets that load settings from a video, and that save and load settings by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.ui.actions import Actions
from mindspeed_mm.ui.make import Data
from mindspeed_mm.ui.text import Words
from mindspeed_mm.ui.videos import notice


@dataclass(frozen=True)
class Saved:
    """The widgets for saving and loading settings."""

    words: Words
    drop: Any
    name: Any
    save: Any
    known: Any
    load: Any

    def wire(self, actions: Actions, message_box: Any) -> None:
        """Connect the widgets to their handlers."""
        inputs = actions.widgets
        shown = [inputs.family, inputs.form, *inputs.parts.values(), *inputs.groups.values()]
        shown += [*inputs.options.values(), *inputs.numbers.values()]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        presets = actions.service.presets

        def keep(data: Data) -> tuple[str, Any]:
            try:
                name = presets.save(data[self.name] or "", inputs.read(data).settings())
            except MindSpeedMMError as error:
                return notice(str(error), bad=True), gr.skip()
            return notice(self.words("saved", {"name": name})), gr.update(choices=presets.names(), value=name)

        def take(name: str | None) -> dict[Any, Any]:
            try:
                return actions.fill(presets.load(name or ""))
            except MindSpeedMMError as error:
                gr.Warning(str(error))
                return {inputs.parts["prompt"]: gr.skip()}

        self.drop.upload(actions.load_video, [self.drop], shown, **quiet)
        self.save.click(keep, inputs.all | {self.name}, [message_box, self.known], **quiet)
        self.load.click(take, [self.known], shown, **quiet)
        self.known.focus(lambda: gr.update(choices=presets.names()), None, [self.known], **quiet)


def build_saved(words: Words) -> Saved:
    """Lay out the widgets."""
    with gr.Accordion(words("settings"), open=False, elem_id="settings"):
        drop = gr.File(label=words("drop"), file_types=[".mp4"], height=120, elem_id="drop")
        with gr.Row():
            name = gr.Textbox(label=words("saved_name"), min_width=160, elem_id="preset-name")
            save = gr.Button(words("save"), size="sm", elem_id="preset-save")
        with gr.Row():
            known = gr.Dropdown(choices=[], label=words("saved_list"), min_width=160, elem_id="presets")
            load = gr.Button(words("load"), size="sm", elem_id="preset-load")
    return Saved(words, drop, name, save, known, load)
