"""The form of each task. Forms are derived from the task registry, so a new task needs no code here.

Does not import torch or gradio.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from mindspeed_mm.conditioning.tasks.catalog import all_tasks
from mindspeed_mm.conditioning.tasks.options import Boxes, TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Task, count_bounds
from mindspeed_mm.serve.fields import SAFE_TASK_TEXTS

Kind = Literal["choice", "words", "switch", "number", "text", "boxes"]
FAMILIES = ("text", "repaint", "control", "extension", "reference", "own")
PAINTED = frozenset({"mask", "masktrack", "bbox", "bboxtrack"})  # modes whose input is a painted region
_FIRST = ("inpainting", "sides", "own", "canny", "frameref")  # default task of each family


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a task, as its widget shows it."""

    name: str
    kind: Kind
    description: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    whole: bool = False
    default: Any = None

    @property
    def key(self) -> str:
        """The key of the widget. Options with the same key share a widget."""
        return f"{self.name}:{self.kind}:{self.whole:d}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """The inputs of a task, or of a request without a task."""

    name: str
    family: str
    summary: str = ""
    task: Task | None = None
    video: bool = False
    images: tuple[int, int] = (0, 99)  # minimum and maximum number; references if the task needs no images
    needs_images: bool = False  # whether the task starts from images
    paints: bool = False  # whether a region can be painted
    mask_file: bool = False
    ends: bool = False  # whether the form takes a first and a last frame
    sides: bool = False  # whether the form extends the sides of the frame
    options: tuple[Option, ...] = ()

    def asks_paint(self, mode: str) -> bool:
        """Return whether the mode needs a painted region."""
        return self.paints and mode.partition(",")[0].strip() in PAINTED

    def shown(self, option: Option, mode: str) -> bool:
        """Return whether to show an option. An option named like a mode is shown only in that mode."""
        modes = next((other.choices for other in self.options if other.name == "mode"), ())
        if any(choice.startswith(option.name) for choice in modes):
            return mode.startswith(option.name)
        return True


@lru_cache(maxsize=1)
def forms() -> Mapping[str, Form]:
    """Return all forms by name, with the default form of each family first."""
    found = [
        Form(name="text", family="text", images=(0, 0)),
        Form(name="sides", family="repaint", video=True, sides=True),
        Form(name="ends", family="extension", ends=True),
        Form(name="own", family="own", video=True, mask_file=True),
    ]
    tasks = [task for task in all_tasks() if _is_servable(task)]
    open_ones = {task.run for task in tasks if not task.fixed}
    found += [_form(task) for task in tasks if not (task.fixed and task.run in open_ones)]
    rank = {name: index for index, name in enumerate(_FIRST)}
    found.sort(key=lambda form: rank.get(form.name, 99))
    return {form.name: form for form in found}


def options_of(task: Task) -> tuple[Option, ...]:
    """Return the options of a task that have widgets.

    Excludes options common to all tasks, paths, and options that the task name fixes.
    """
    hidden = {*TaskOptions.model_fields, *task.fixed}
    found = (_option(name, field) for name, field in task.options.model_fields.items() if name not in hidden)
    return tuple(option for option in found if option is not None)


def _form(task: Task) -> Form:
    low, high = count_bounds(task.needs, "image")
    names = task.options.model_fields
    return Form(
        name=task.name,
        family=task.family,
        summary=task.summary,
        task=task,
        video=count_bounds(task.needs, "clip")[1] > 0,
        images=(low, high) if high else (0, 99),
        needs_images=high > 0,
        paints="mask" in names and "mode" in names,
        options=options_of(task),
    )


def _is_servable(task: Task) -> bool:
    """Return whether one uploaded clip and the options with widgets suffice for the task."""
    if count_bounds(task.needs, "clip")[1] > 1:
        return False
    shown = {option.name for option in options_of(task)}
    required = {name for name, field in task.options.model_fields.items() if field.is_required()}
    return required <= {*shown, *task.fixed}


def _option(name: str, field: FieldInfo) -> Option | None:
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    bounds: dict[type, Any] = {type(item): item for item in field.metadata}
    low = bounds[Ge].ge if Ge in bounds else bounds[Gt].gt if Gt in bounds else None
    high = bounds[Le].le if Le in bounds else None
    default = None if field.is_required() else field.default
    common: dict[str, Any] = {"name": name, "description": field.description or "", "low": low, "high": high}
    if get_origin(annotation) is Literal:
        choices = tuple(map(str, get_args(annotation)))
        usual = default or ("masktrack" if "masktrack" in choices else choices[0])
        return Option(**common, kind="choice", choices=choices, default=usual)
    if get_origin(annotation) is tuple and (words := _words(annotation)):
        return Option(**common, kind="words", choices=words, default=list(default or ()))
    if _is_boxes(field):
        return Option(**common, kind="boxes", default="")
    if annotation is bool:
        return Option(**common, kind="switch", default=default)
    if annotation in (int, float):
        return Option(**common, kind="number", whole=annotation is int, default=default)
    if annotation is str and name in SAFE_TASK_TEXTS:
        return Option(**common, kind="text", default=default or "")
    return None


def _words(annotation: Any) -> tuple[str, ...]:
    inner = get_args(annotation)[0]
    return tuple(map(str, get_args(inner))) if get_origin(inner) is Literal else ()


def _is_boxes(field: FieldInfo) -> bool:
    return field.annotation == get_args(Boxes)[0] if get_origin(Boxes) is Annotated else False
