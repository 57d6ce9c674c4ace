"""Converts the inputs of the page to the fields and files of a request, and back.

Does not import torch or gradio.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindspeed_mm.conditioning.annotate.opencv import Mask
from mindspeed_mm.conditioning.tasks.spec import Clip
from mindspeed_mm.data.images import read_image
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.serve.fields import read_fields
from mindspeed_mm.serve.uploads import SLOTS
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.ui.forms import Form, forms
from mindspeed_mm.ui.mask import Painting, painted_box, write_clip_masks, write_image_mask

NUMBERS = (
    "width",
    "height",
    "num_frames",
    "fps",
    "steps",
    "seed",
    "guidance_scale",
    "shift",
    "context_scale",
    "preset",
    "solver",
    "short_clip",
)
WINDOWS = ("window", "window_overlap", "window_mode", "window_colors", "paste_back")


@dataclass(frozen=True, kw_only=True)
class Filled:
    """The inputs that the user filled in."""

    form: str
    prompt: str = ""
    negative_prompt: str | None = None  # None: the server's default
    numbers: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # by name
    sides: tuple[float, float, float, float] = (0, 0, 0, 0)  # left, top, right, bottom, in percent
    video: Path | None = None
    mask: Path | None = None
    images: tuple[Path, ...] = ()
    first: Path | None = None
    last: Path | None = None
    painted: Mask | None = None
    frame: int = 0
    grow: float = 0.0
    window_prompts: tuple[str, ...] = ()
    window_references: tuple[str, ...] = ()  # per window, image numbers from 1, or "-" for none

    def windows(self) -> dict[str, Any]:
        """Return the prompts and references of windows, as inference JSON keys. Raises ConfigError."""
        found: dict[str, Any] = {}
        if self.window_prompts:
            found["window_prompts"] = list(self.window_prompts)
        if self.window_references:
            found["window_references"] = [_reference_numbers(line) for line in self.window_references]
        return found

    def settings(self) -> dict[str, Any]:
        """Return all inputs except the sources, as inference JSON keys."""
        form = forms()[self.form]
        settings: dict[str, Any] = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        settings |= {**self.numbers, **self.windows()}
        if form.task is not None:
            settings["task"] = {"type": form.task.name, **_options(form, self)}
        if form.sides and any(self.sides):
            settings["outpaint"] = [side / 100 for side in self.sides]
        settings["inputs"] = ["video"] if form.video else ["first_frame"] if form.ends else []
        return {name: value for name, value in settings.items() if value not in (None, "")}


@dataclass(frozen=True)
class Request:
    """The fields and files that are sent to the server."""

    fields: dict[str, Any]
    files: dict[str, list[Path]]

    def texts(self) -> dict[str, str]:
        """Return the fields as form values, which are strings."""
        return {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in self.fields.items()
        }


def build(filled: Filled, folder: Path) -> Request:
    """Build the request. A painted region becomes a box, or a mask file in `folder`.

    Raises ConfigError and DataError.
    """
    form = forms()[filled.form]
    _check_sources(form, filled)
    fields: dict[str, Any] = {"prompt": filled.prompt}
    fields |= {name: value for name, value in filled.numbers.items() if value not in (None, "")}
    fields |= filled.windows()
    if filled.negative_prompt is not None:
        fields["negative_prompt"] = filled.negative_prompt
    files: dict[str, list[Path]] = {}
    if form.video and filled.video:
        files["src_video"] = [filled.video]
    if form.mask_file and filled.mask:
        files["src_mask"] = [filled.mask]
    if form.images[1] and filled.images:
        files["src_ref_images"] = list(filled.images)
    if form.ends:
        files |= {
            slot: [path]
            for slot, path in (("first_frame", filled.first), ("last_frame", filled.last))
            if path
        }
    if form.sides:
        fields["outpaint"] = [side / 100 for side in filled.sides]
    if form.task is not None:
        options = _options(form, filled)
        if form.asks_paint(str(options.get("mode", ""))):
            options = _painted(form, filled, options, files, folder)
        fields["task"] = {"type": form.task.name, **options}
    return Request(fields, files)


def lines_of(text: str | None) -> tuple[str, ...]:
    """Return the nonempty lines of a text box."""
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())


def number_of(value: Any) -> Any:
    """Parse a text box. Returns a number, a list of numbers, other text, or None if it is empty."""
    if not isinstance(value, str):
        return value
    try:
        found = [float(part) for part in value.split(",")] if value.strip() else []
    except ValueError:
        return value.strip()
    numbers = [int(number) if number.is_integer() else number for number in found]
    return numbers if len(numbers) > 1 else numbers[0] if numbers else None


def text_of(value: Any) -> str:
    """Format a value for a text box."""
    values = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    return ", ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in values)


def _reference_numbers(line: str) -> list[int]:
    """Parse reference numbers: `1, 3` gives [0, 2], and `-` gives []. Raises ConfigError."""
    words = line.replace(",", " ").split()
    if words == ["-"]:
        return []
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(
            f"got {line!r:.40}", where="window_references", expected="numbers of the images, as 1, 2, or -"
        )
    return [int(word) - 1 for word in words]


def _check_sources(form: Form, filled: Filled) -> None:
    if not filled.prompt.strip():
        raise ConfigError("is missing", where="prompt", fix="describe the video")
    if form.video and filled.video is None:
        raise ConfigError("is missing", where="src_video", fix="add a clip")
    if form.needs_images and len(filled.images) < form.images[0]:
        raise ConfigError(f"got {len(filled.images)}", where="images", expected=f"at least {form.images[0]}")
    if form.ends and filled.first is None and filled.last is None:
        raise ConfigError("are missing", where="first and last frame", fix="add one of them")
    if form.sides and not any(filled.sides):
        raise ConfigError("are all 0", where="sides", fix="extend at least one side")


def _options(form: Form, filled: Filled) -> dict[str, Any]:
    """Return the options that differ from the task's defaults or that the task requires."""
    assert form.task is not None
    mode = str(filled.options.get("mode", ""))
    found = {}
    for option in form.options:
        value = filled.options.get(option.name)
        required = form.task.options.model_fields[option.name].is_required()
        if value in (None, "") or not form.shown(option, mode):
            continue
        if required or value != option.default:
            found[option.name] = value
    return found


def _painted(
    form: Form, filled: Filled, options: dict[str, Any], files: dict[str, list[Path]], folder: Path
) -> dict[str, Any]:
    """Return the options with the mask or box that the mode needs, made from the painted region."""
    mode, comma, rest = str(options["mode"]).partition(",")
    if mode.startswith("bbox") and options.get("bbox"):
        return options
    if filled.painted is None:
        raise ConfigError("is empty", where="mask", fix="paint the region to generate")
    clip = Clip.open(filled.video) if form.video and filled.video else None
    size = clip.size if clip else read_image(filled.images[0]).shape[:2]
    if mode.startswith("bbox"):
        return {**options, "bbox": painted_box(filled.painted, size)}
    painting = Painting(
        mask=filled.painted,
        frame=filled.frame,
        follow=mode == "masktrack",
        refine=bool(filled.options.get("refine", True)),
        grow=filled.grow,
    )
    if clip and filled.video:
        path = write_clip_masks(filled.video, painting, folder)
    else:
        path = write_image_mask(size, replace(painting, frame=0), folder)
    files["src_mask"] = [path]
    return {**options, "mode": f"mask{comma}{rest}"}


def plan(request: Request, model: Mapping[str, Any], folder: Path) -> GenerationRequest:
    """Parse the request as the server does, with the same checks.

    `model`: the model's entry in /v1/models. Raises ConfigError.
    """
    fields = read_fields(
        request.fields, str(model["id"]), form=False, fps=model.get("defaults", {}).get("fps")
    )
    weights = {"transformer": ["-"] * int(model.get("experts", 1)), "vae": "-", "text_encoder": "-"}
    values: dict[str, Any] = {
        "model": weights,
        "output_path": str(folder),
        **model.get("defaults", {}),
        **fields,
    }
    for slot, paths in request.files.items():
        texts = [str(path) for path in paths]
        values[SLOTS[slot].key] = texts if SLOTS[slot].several else texts[0]
    return GenerateJob.from_values(
        {**values, "name": "video"}, folder / "request.json", needs_weights=False
    ).videos[0]


def form_of(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the form name and task options for the settings of a video, or for saved settings."""
    task = settings.get("task")
    if task is None:
        given = settings.get("inputs") or ()
        ends = {"first_frame", "last_frame"} & set(given)
        return ("sides" if settings.get("outpaint") else "ends" if ends else "own" if given else "text"), {}
    values = {"type": task} if isinstance(task, str) else dict(task)
    name = str(values.pop("type"))
    known = forms()
    if name in known:
        return name, values
    # The name may be that of a task with the mode fixed, such as TASK_MODE.
    for form in known.values():
        if form.task is not None and name.startswith(f"{form.name}_"):
            return form.name, {**values, "mode": name.removeprefix(f"{form.name}_")}
    raise ConfigError(f"the page has no form for {name!r}", where="task")
