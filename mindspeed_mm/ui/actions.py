"""Event handlers of the inputs: choose a task, read a source, preview, queue, and load settings.

Unless noted, a handler returns widget updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from mindspeed_mm.conditioning.tasks.spec import Clip
from mindspeed_mm.data.images import read_image
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.generation.embedded import read_embedded
from mindspeed_mm.generation.sampling_config import Numbers
from mindspeed_mm.ui.forms import Form, Option, forms
from mindspeed_mm.ui.make import MAIN, Data, Widgets, form_choices, grower, painter
from mindspeed_mm.ui.preview import draw_conditions
from mindspeed_mm.ui.request import build, form_of, plan, text_of
from mindspeed_mm.ui.sample import PROMPT
from mindspeed_mm.ui.service import Service
from mindspeed_mm.ui.size import fit
from mindspeed_mm.ui.text import Words
from mindspeed_mm.ui.videos import notice

Updates = dict[Any, Any]


class Actions:
    """The handlers of the page in one language."""

    def __init__(self, words: Words, service: Service, widgets: Widgets) -> None:
        self.words, self.service, self.widgets = words, service, widgets

    # Choose a task

    def choose_family(self, data: Data) -> Updates:
        """List the tasks of the family, and show the inputs of its default task."""
        form = next(form for form in forms().values() if form.family == data[self.widgets.family])
        return self._show(form, has_source=self._has_source(form, data))

    def choose_task(self, data: Data) -> Updates:
        """Show the inputs of the task."""
        form = forms()[data[self.widgets.form]]
        return self._show(form, of_family=False, has_source=self._has_source(form, data))

    def choose_mode(self, data: Data) -> Updates:
        """Show the inputs of the task's mode."""
        form = forms()[data[self.widgets.form]]
        mode = self._mode(form, data)
        shown = {
            self.widgets.options[option.key]: gr.update(visible=form.shown(option, mode))
            for option in form.options
        }
        visible = form.asks_paint(mode) and self._has_source(form, data)
        return {**shown, self.widgets.groups["paint"]: gr.update(visible=visible)}

    def _has_source(self, form: Form, data: Data) -> bool:
        """Return whether the source to paint on is given."""
        return bool(data[self.widgets.parts["video" if form.video else "images"]])

    def _mode(self, form: Form, data: Data) -> str:
        found = (data[self.widgets.options[option.key]] for option in form.options if option.name == "mode")
        return str(next(found, "") or "")

    def _show(
        self,
        form: Form,
        *,
        of_family: bool = True,
        values: Mapping[str, Any] | None = None,
        has_source: bool = False,
    ) -> Updates:
        """Show the inputs of `form` and hide all others. `values` are the values of its options."""
        given = values or {}
        part, groups = self.widgets.parts, self.widgets.groups
        options = {option.key: option for option in form.options}
        mode = str(given.get("mode") or next((o.default for o in form.options if o.name == "mode"), ""))
        updates: Updates = {
            part["video"]: gr.update(visible=form.video),
            part["mask_file"]: gr.update(visible=form.mask_file),
            part["images"]: gr.update(
                visible=form.images[1] > 0, label=self.words("sources" if form.needs_images else "images")
            ),
            part["first"]: gr.update(visible=form.ends),
            part["last"]: gr.update(visible=form.ends),
            groups["paint"]: gr.update(visible=has_source and form.asks_paint(mode)),
            groups["sides"]: gr.update(visible=form.sides),
        }
        for key, widget in self.widgets.options.items():
            option = options.get(key)
            updates[widget] = (
                gr.update(visible=False) if option is None else self._option(form, option, mode, given)
            )
        if of_family:
            choices = form_choices(self.words, form.family)
            updates[self.widgets.form] = gr.update(choices=choices, value=form.name)
        return updates

    def _option(self, form: Form, option: Option, mode: str, given: Mapping[str, Any]) -> Any:
        value = given.get(option.name, option.default)
        if option.kind == "boxes" and isinstance(value, (list, tuple)):
            value = " ".join(",".join(f"{side:g}" for side in box) for box in value)
        update = {"visible": form.shown(option, mode), "value": value}
        update["info"] = self.words.option(option.name, option.description)
        return gr.update(**update, choices=list(option.choices)) if option.choices else gr.update(**update)

    # Read the sources

    def take_video(self, data: Data) -> Updates:
        """Set the size and length from a new clip, and show its first frame for painting."""
        form = forms()[data[self.widgets.form]]
        video = data[self.widgets.parts["video"]]
        if not video:
            return {self.widgets.parts["painter"]: "", self.widgets.groups["paint"]: gr.update(visible=False)}
        try:
            clip = Clip.open(str(video))
            return {
                **self._sized(clip, data),
                **self._canvas(clip, 0),
                self.widgets.groups["paint"]: gr.update(visible=form.asks_paint(self._mode(form, data))),
                self.widgets.parts["frame"]: gr.update(maximum=max(1, clip.num_frames - 1), value=0),
            }
        except MindSpeedMMError as error:
            gr.Warning(_plain(error))
            return {self.widgets.parts["painter"]: ""}

    def take_images(self, data: Data) -> Updates:
        """Show the first image for painting, if the task starts from images."""
        form = forms()[data[self.widgets.form]]
        images = data[self.widgets.parts["images"]]
        if not images or form.video or not form.paints:
            return {self.widgets.parts["painter"]: gr.skip()}
        try:
            return {
                self.widgets.parts["painter"]: painter(self.words, read_image(str(images[0]))),
                self.widgets.groups["paint"]: gr.update(visible=form.asks_paint(self._mode(form, data))),
            }
        except MindSpeedMMError as error:
            gr.Warning(_plain(error))
            return {self.widgets.parts["painter"]: gr.skip()}

    def take_frame(self, data: Data) -> Updates:
        """Show another frame for painting, and discard the old painting."""
        video = data[self.widgets.parts["video"]]
        if not video:
            return {self.widgets.parts["painter"]: gr.skip()}
        try:
            clip = Clip.open(str(video))
            return self._canvas(clip, min(int(data[self.widgets.parts["frame"]] or 0), clip.num_frames - 1))
        except MindSpeedMMError as error:
            gr.Warning(_plain(error))
            return {self.widgets.parts["painter"]: gr.skip()}

    def take_sides(self, data: Data) -> Updates:
        """Update the size of the video when the sides to extend change."""
        video = data[self.widgets.parts["video"]]
        if not video:
            return {self.widgets.numbers["width"]: gr.skip()}
        try:
            return self._sized(Clip.open(str(video)), data)
        except MindSpeedMMError:
            return {self.widgets.numbers["width"]: gr.skip()}

    def take_sample(self) -> Updates:
        """Fill in the sample clip and its prompt."""
        return {
            self.widgets.parts["video"]: str(self.service.sample),
            self.widgets.parts["prompt"]: PROMPT,
        }

    def _canvas(self, clip: Clip, frame: int) -> Updates:
        pixels = clip.reader.read([frame])[0]
        part = self.widgets.parts
        return {part["painter"]: painter(self.words, pixels), part["grower"]: grower(pixels)}

    def _sized(self, clip: Clip, data: Data) -> Updates:
        known = {
            **{n: Numbers.model_fields[n].default for n in ("width", "height")},
            **self.service.defaults(),
        }
        form = forms()[data[self.widgets.form]]
        part = self.widgets.parts
        sides = tuple(float(data[part[side]]) for side in ("left", "top", "right", "bottom"))
        width, height, frames = fit(
            clip.size,
            clip.num_frames,
            int(known["width"]) * int(known["height"]),
            int(known.get("num_frames") or Numbers.model_fields["num_frames"].default),
            sides if form.sides else (0, 0, 0, 0),  # type: ignore[arg-type]
        )
        made = {"width": width, "height": height, "num_frames": frames}
        return {self.widgets.numbers[name]: value for name, value in made.items()}

    # Preview and queue

    def preview(self, data: Data) -> tuple[Any, str]:
        """Return a strip of the model's inputs, and remarks."""
        try:
            request = build(self.widgets.read(data), self.service.work)
            planned = plan(request, self.service.model(), self.service.scratch())
            sheet, notes = draw_conditions(planned)
        except MindSpeedMMError as error:
            return gr.update(visible=False, value=None), notice(_plain(error), bad=True)
        if sheet is None:
            return gr.update(visible=False, value=None), notice(self.words("only_prompt"))
        return gr.update(visible=True, value=sheet), notice(
            "; ".join(_without_folders(note) for note in notes)
        )

    def run(self, data: Data) -> str:
        """Queue the video, and return a notice."""
        try:
            request = build(self.widgets.read(data), self.service.work)
            plan(request, self.service.model(), self.service.scratch())
            self.service.send(request)
        except MindSpeedMMError as error:
            return notice(_plain(error), bad=True)
        return notice(self.words("queued"))

    # Settings

    def load_video(self, path: str | None) -> Updates:
        """Load the settings stored in a dropped video."""
        if not path:
            return {self.widgets.parts["prompt"]: gr.skip()}
        try:
            return self.fill(read_embedded(path))
        except MindSpeedMMError as error:
            gr.Warning(_plain(error))
            return {self.widgets.parts["prompt"]: gr.skip()}

    def fill(self, settings: Mapping[str, Any]) -> Updates:
        """Fill the widgets from `settings`, which use the keys of the inference JSON. Raises ConfigError."""
        name, options = form_of(settings)
        form = forms()[name]
        part = self.widgets.parts
        updates = self._show(form, values=options)
        updates[self.widgets.family] = form.family
        updates[part["prompt"]] = settings.get("prompt") or ""
        updates[part["negative"]] = settings.get("negative_prompt") or ""
        for number, widget in self.widgets.numbers.items():
            value = settings.get(number)
            if number in MAIN:
                updates[widget] = gr.skip() if value is None else value
            else:
                updates[widget] = text_of(value)
        updates[part["window_prompts"]] = "\n".join(settings.get("window_prompts") or ())
        updates[part["window_references"]] = "\n".join(
            ", ".join(str(number + 1) for number in row) or "-"
            for row in settings.get("window_references") or ()
        )
        if settings.get("outpaint"):
            for side, share in zip(("left", "top", "right", "bottom"), settings["outpaint"], strict=True):
                updates[part[side]] = round(100 * share)
        gr.Info(self.words("loaded"))
        return updates


def _plain(error: MindSpeedMMError) -> str:
    return _without_folders(str(error))


def _without_folders(text: str) -> str:
    """Shorten absolute paths to file names, because users do not know the server's folders."""
    return " ".join(
        Path(word).name if word.startswith("/") and len(word) > 1 else word for word in text.split(" ")
    )
