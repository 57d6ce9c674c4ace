"""The panel with the queue, the result and the history. It polls the server every second."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.ui.actions import Actions
from mindspeed_mm.ui.service import Service
from mindspeed_mm.ui.text import Words
from mindspeed_mm.ui.videos import SHOWN, Video, finished, notice, remarks, row, short, waiting

_SECONDS = 1.0


class QueuePanel:
    """The right column of the page."""

    def __init__(self, words: Words, service: Service) -> None:
        self.words, self.service = words, service
        self.rows: list[Any] = []
        self.texts: list[Any] = []
        self.cancels: list[Any] = []
        with gr.Accordion(words("queue"), open=True, elem_id="queue"):
            self.state = gr.HTML(notice(words("queue_empty")), elem_id="queue-state", padding=False)
            for index in range(SHOWN):
                with gr.Row(visible=False, elem_classes="job-row") as line:
                    self.texts.append(gr.HTML(padding=False, elem_id=f"job-{index}"))
                    self.cancels.append(gr.Button(words("cancel"), size="sm", elem_id=f"cancel-{index}"))
                self.rows.append(line)
        with gr.Accordion(words("result"), open=True, elem_id="result"):
            self.title = gr.HTML(notice(words("no_result")), elem_id="result-title", padding=False)
            with gr.Row():
                self.source = gr.Video(
                    label=words("source"),
                    interactive=False,
                    visible=False,
                    loop=True,
                    height=240,
                    min_width=150,
                    elem_id="result-source",
                    buttons=[],
                )
                self.video = gr.Video(
                    label=words("result"),
                    interactive=False,
                    visible=False,
                    loop=True,
                    height=240,
                    autoplay=True,
                    min_width=150,
                    elem_id="result-video",
                    buttons=["download"],
                )
            with gr.Row(visible=False) as self.buttons:
                self.reuse = gr.Button(words("reuse"), size="sm", elem_id="reuse")
                self.as_source = gr.Button(words("as_source"), size="sm", elem_id="as-source")
                self.delete = gr.Button(words("delete"), size="sm", elem_id="delete")
            self.gallery = gr.Gallery(
                label=words("history"),
                columns=4,
                fit_columns=False,
                height=220,
                allow_preview=False,
                object_fit="contain",
                elem_id="history",
                interactive=False,
                buttons=[],
            )
        self.ids = gr.State([])  # ids of the videos in the rows
        self.done = gr.State([])  # ids of the videos in the gallery
        self.chosen = gr.State("")  # id of the result
        self.seen = gr.State("")  # fingerprint of the last drawn state
        self.armed = gr.State("")  # id of the video that a second click deletes
        self.timer = gr.Timer(_SECONDS)

    @property
    def _result(self) -> list[Any]:
        return [self.title, self.source, self.video, self.buttons, self.chosen, self.delete, self.armed]

    def wire(self, actions: Actions) -> None:
        """Connect the widgets to their handlers."""
        drawn = [
            self.seen,
            self.state,
            self.ids,
            self.done,
            *self.rows,
            *self.texts,
            self.gallery,
            *self._result,
        ]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        self.timer.tick(self.poll, [self.seen, self.done, self.chosen], drawn, **quiet)
        for index, button in enumerate(self.cancels):
            button.click(
                lambda ids, at=index: self.cancel(ids, at), [self.ids], [self.state, self.seen], **quiet
            )
        self.gallery.select(self.choose, [self.done], self._result, **quiet)
        self.delete.click(
            self.remove, [self.chosen, self.armed], [*self._result, self.seen, self.state], **quiet
        )
        inputs = actions.widgets
        shown = [inputs.family, inputs.form, *inputs.parts.values(), *inputs.groups.values()]
        shown += [*inputs.options.values(), *inputs.numbers.values()]
        self.reuse.click(lambda chosen: self.settings_of(actions, chosen), [self.chosen], shown, **quiet)
        self.as_source.click(self.path_of, [self.chosen], [inputs.parts["video"]], **quiet)

    def poll(self, seen: str, done: list[str], chosen: str) -> dict[Any, Any]:
        """Redraw the queue and the history if they have changed."""
        try:
            videos = self.service.videos()
        except MindSpeedMMError as error:
            text = notice(self.words("unreachable", {"why": str(error)}), bad=True)
            return (
                {self.state: text, self.seen: "unreachable"} if seen != "unreachable" else {self.seen: seen}
            )
        now = repr(
            [
                (
                    v["id"],
                    v["status"],
                    v["progress"],
                    v.get("eta_seconds"),
                    v.get("queue_position"),
                    v.get("notes"),
                )
                for v in videos
            ]
        )
        if now == seen:
            return {self.seen: seen}
        queue, complete = waiting(videos), finished(videos)
        failed = [video for video in videos[:1] if video["status"] == "failed"]
        lines = [*failed, *queue]
        updates: dict[Any, Any] = {self.seen: now, self.ids: [video["id"] for video in lines[:SHOWN]]}
        for index in range(SHOWN):
            here = index < len(lines)
            updates[self.rows[index]] = gr.update(visible=here)
            if here:
                updates[self.texts[index]] = row(lines[index], self.words)
        more = len(lines) - SHOWN
        text = "" if lines else self.words("queue_empty")
        updates[self.state] = notice(self.words("queue_more", {"count": more}) if more > 0 else text)
        ids = [video["id"] for video in complete]
        if ids != done:
            updates |= {self.done: ids, self.gallery: self._pictures(complete)}
            if (seen and ids and (not done or ids[0] != done[0])) or (ids and not chosen):
                updates |= self._show(complete[0])
        return updates

    def _pictures(self, videos: list[Video]) -> list[tuple[str, str]]:
        found = []
        for video in videos:
            path = self.service.files.get(video["id"], "thumbnail", ".webp")
            if path is not None:
                found.append((str(path), short(video["prompt"])))
        return found

    def _show(self, video: Video) -> dict[Any, Any]:
        made = self.service.files.get(video["id"], "video", ".mp4")
        source = self.service.files.get(video["id"], "source", ".mp4")
        return {
            self.title: notice(short(video["prompt"])) + remarks(video),
            self.source: gr.update(value=None if source is None else str(source), visible=source is not None),
            self.video: gr.update(value=None if made is None else str(made), visible=made is not None),
            self.buttons: gr.update(visible=True),
            self.chosen: video["id"],
            self.delete: gr.update(value=self.words("delete"), variant="secondary"),
            self.armed: "",
        }

    def choose(self, done: list[str], event: gr.SelectData) -> dict[Any, Any]:
        """Show a video from the history next to its source."""
        known = {video["id"]: video for video in self.service.videos()}
        place = int(event.index if not isinstance(event.index, (list, tuple)) else event.index[0])
        video = known.get(done[place]) if place < len(done) else None
        return {self.chosen: ""} if video is None else self._show(video)

    def cancel(self, ids: list[str], index: int) -> tuple[str, str]:
        """Cancel the video in a row."""
        if index >= len(ids):
            return "", ""
        try:
            self.service.delete(ids[index])
        except MindSpeedMMError as error:
            return notice(str(error), bad=True), ""
        return notice(self.words("cancelled")), ""

    def remove(self, chosen: str, armed: str) -> dict[Any, Any]:
        """Delete the result on the second click."""
        if not chosen:
            return {self.armed: ""}
        if armed != chosen:
            return {
                self.armed: chosen,
                self.delete: gr.update(value=self.words("delete_sure"), variant="stop"),
            }
        try:
            self.service.delete(chosen)
        except MindSpeedMMError as error:
            return {self.state: notice(str(error), bad=True)}
        return {
            self.title: notice(self.words("deleted")),
            self.source: gr.update(value=None, visible=False),
            self.video: gr.update(value=None, visible=False),
            self.buttons: gr.update(visible=False),
            self.chosen: "",
            self.armed: "",
            self.delete: gr.update(value=self.words("delete"), variant="secondary"),
            self.seen: "",
        }

    def settings_of(self, actions: Actions, chosen: str) -> dict[Any, Any]:
        """Fill the inputs with the settings stored in the result's file."""
        path = self.service.files.get(chosen, "video", ".mp4") if chosen else None
        return actions.load_video(None if path is None else str(path))

    def path_of(self, chosen: str) -> str | None:
        """Return the path of the result, for use as the source of the next video."""
        path = self.service.files.get(chosen, "video", ".mp4") if chosen else None
        return None if path is None else str(path)
