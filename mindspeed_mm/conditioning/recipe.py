"""Recipes: which tasks to make from a dataset of plain clips. Does not import torch.

Random choices depend only on (seed, row). Example:

seed: 7
variants: 2
tasks:
  inpainting: {weight: 0.5, options: {mode: salientmasktrack, maskaug_mode: random}}
  framerefext: {weight: 0.3, options: {mode: {choice: [first, last]}, ref_num: {integers: [1, 4]}}}
  border: {task: outpainting_inner, weight: 0.2, options: {expand_ratio: {uniform: [0.1, 0.4]}}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_origin

import numpy as np
from pydantic import Field, field_validator, model_validator

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.conditioning.tasks.options import ANNOTATORS_FOLDER
from mindspeed_mm.conditioning.tasks.spec import Task
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import display_path, json_type
from mindspeed_mm.outputs import name_problem
from mindspeed_mm.registry import did_you_mean

_KINDS = ("choice", "uniform", "integers")
_SEED = "seed"  # the option that gets its own value for each row


class RecipeTask(Config):
    """One kind of sample in a recipe."""

    task: str | None = Field(default=None, description="name of the task; null = the name of this entry")
    weight: float = Field(default=1.0, gt=0, le=1e6, description="relative frequency of this entry")
    clips: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="names of the clips that this entry applies to, with * and ? as wildcards",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "options of the task; a value may be {choice: […]}, {uniform: [a, b]} or {integers: [a, b]}"
        ),
    )
    shift: float | None = Field(
        default=None,
        ge=0.001,
        le=1000,
        description=(
            "in training: shift of the noise schedule for these samples; null = the shift in the model JSON"
        ),
    )
    loss_weight: float = Field(
        default=1.0, gt=0, le=1000, description="in training: factor of the loss of these samples"
    )


class RecipeStage(Config):
    """The weights of the entries for a range of iterations."""

    until: int | None = Field(
        default=None,
        gt=0,
        description="last iteration of the stage; null = to the end of training, only in the last stage",
    )
    weights: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(
        min_length=1, description="weight of each entry of tasks; entries without a weight are not sampled"
    )


class Recipe(Config):
    """The tasks of a recipe and their weights."""

    seed: int = Field(default=0, ge=0, le=(1 << 63) - 1, description="seed of all random choices")
    variants: int = Field(default=1, ge=1, le=1000, description="number of samples per clip")
    tasks: dict[str, RecipeTask] = Field(min_length=1, description="the entries, by name")
    stages: tuple[RecipeStage, ...] = Field(
        default=(),
        description=(
            "in training: weights for successive ranges of iterations; the last stage lasts to the end"
        ),
    )

    @field_validator("tasks")
    @classmethod
    def _names_are_file_names(cls, tasks: dict[str, RecipeTask]) -> dict[str, RecipeTask]:
        for name in tasks:
            if problem := name_problem(name, "-000000-000.png"):
                raise ValueError(f"{name!r:.60} {problem}")
        return tasks

    @model_validator(mode="after")
    def _stages_follow_one_another(self) -> Recipe:
        ends = [stage.until for stage in self.stages[:-1]]
        if None in ends or any(a >= b for a, b in pairwise(filter(None, [*ends, *self._last_end()]))):
            raise ValueError(
                f"stages end at {', '.join(str(stage.until) for stage in self.stages)}; expected increasing "
                "`until`, with null only in the last stage"
            )
        for number, stage in enumerate(self.stages):
            for name in stage.weights:
                if name not in self.tasks:
                    raise ValueError(
                        f"stages[{number}].weights names {name!r:.60}, which is not in tasks"
                        f"{did_you_mean(name, list(self.tasks))}"
                    )
            if not any(stage.weights.values()):
                raise ValueError(f"stages[{number}].weights are all 0; expected one above 0")
        return self

    def _last_end(self) -> list[int | None]:
        return [stage.until for stage in self.stages[-1:]]

    def weights(self, iteration: int) -> dict[str, float]:
        """Map each entry to its weight at an iteration, counted from 1. Entries of weight 0 are left out."""
        for stage in self.stages:
            if stage is self.stages[-1] or iteration <= (stage.until or 0):
                return {name: weight for name, weight in stage.weights.items() if weight}
        return {name: entry.weight for name, entry in self.tasks.items()}

    def ignored(self, where: str) -> list[str]:
        """Return a remark if the recipe sets keys that only affect training on raw clips."""
        named = [
            f"tasks.{name}.{key}"
            for name, entry in self.tasks.items()
            for key in ("shift", "loss_weight")
            if key in entry.model_fields_set
        ]
        found = [*(["stages"] if self.stages else []), *named]
        return [f"{where} does not use {', '.join(found)}; training on raw clips does"] if found else []


@dataclass(frozen=True)
class Draw:
    """The drawn task and options of one sample. Picklable."""

    name: str  # name of the recipe entry
    task_name: str
    options: Config

    @property
    def task(self) -> Task:
        """The entry of TASKS."""
        return TASKS.get(self.task_name)


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file (YAML or JSON). Raises ConfigError."""
    values, where = read_yaml(path), display_path(path)
    if not isinstance(values, Mapping):
        raise ConfigError(f"got {json_type(values)}", where=where, expected="an object with tasks")
    return parse_recipe(values, where)


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Parse a recipe, and check that its tasks, options and networks exist. Raises ConfigError."""
    recipe = parse(Recipe, values, where)
    for name, entry in recipe.tasks.items():
        _check_entry(name, entry, f"{where}:tasks.{name}")
    return recipe


def entry_task(name: str, entry: RecipeTask, where: str = "") -> Task:
    """Return the task of an entry. Raises ConfigError for an unknown name, with the nearest known one."""
    try:
        return TASKS.get(entry.task or name)
    except ConfigError as error:
        raise error.at(where) if where else error from None


def draws(recipe: Recipe, row: int, clip: str) -> list[Draw]:
    """Draw the task and options of each variant of a clip; [] if no entry applies to the clip.

    `row` is the index of the clip in the dataset. `clip` is the name that each entry's `clips` are matched
    against. The result is the same in every process, and more variants do not change the first ones. An entry
    with a control task is drawn at most once while other entries are left. Raises ConfigError.
    """
    fitting = {name: entry for name, entry in recipe.tasks.items() if _takes(entry, clip)}
    generator = np.random.default_rng([recipe.seed, row])
    found: list[Draw] = []
    spent: set[str] = set()
    for _ in range(recipe.variants if fitting else 0):
        names = [name for name in fitting if name not in spent] or list(fitting)
        name = _pick({name: fitting[name].weight for name in names}, generator)
        found.append(_draw(name, fitting[name], generator))
        if found[-1].task.family == "control":
            spent.add(name)
    return found


def training_draw(
    recipe: Recipe, clip: str, *, seed: int, sample_index: int, first_index: int, iteration: int
) -> Draw | None:
    """Draw the task of one training sample; None if no entry applies to the clip at this iteration.

    `iteration` counts from 1. The entry and its options depend on the run's `seed` and on `first_index`, the
    index of the first sample in the micro-batch, because all samples of a micro-batch must have the same
    shape. Random choices within the task depend on the sample's own index. Raises ConfigError.
    """
    weights = {name: w for name, w in recipe.weights(iteration).items() if _takes(recipe.tasks[name], clip)}
    if not weights:
        return None
    generator = np.random.default_rng([recipe.seed, seed, first_index])
    name = _pick(weights, generator)
    own = np.random.default_rng([recipe.seed, seed, sample_index, 1])
    return _draw(name, recipe.tasks[name], generator, int(own.integers(1 << 31)))


def entries_for(recipe: Recipe, clip: str) -> tuple[str, ...]:
    """Return the names of the entries that apply to a clip of this name."""
    return tuple(name for name, entry in recipe.tasks.items() if _takes(entry, clip))


def _pick(weights: Mapping[str, float], generator: np.random.Generator) -> str:
    names, ends = list(weights), np.cumsum(list(weights.values()))
    index = int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))
    return names[min(index, len(names) - 1)]


def _draw(name: str, entry: RecipeTask, generator: np.random.Generator, own_seed: int | None = None) -> Draw:
    values = {key: _drawn(value, generator) for key, value in entry.options.items()}
    seed = int(generator.integers(1 << 31)) if own_seed is None else own_seed
    task = entry_task(name, entry)
    if _SEED in task.options.model_fields:
        values[_SEED] = seed
    return Draw(name, task.name, task.parse(values, f"tasks.{name}.options"))


def _takes(entry: RecipeTask, clip: str) -> bool:
    return any(fnmatch(clip, pattern) or fnmatch(Path(clip).name, pattern) for pattern in entry.clips)


def _check_entry(name: str, entry: RecipeTask, where: str) -> None:
    task = entry_task(name, entry, where)
    if not task.supports_training:
        fitting = [name for name in TASKS if TASKS.get(name).supports_training]
        raise ConfigError(
            f"task {task.name} cannot make training samples{did_you_mean(task.name, fitting)}",
            where=where,
            expected=f"one of {', '.join(fitting)}",
        )
    if _SEED in entry.options:
        raise ConfigError(
            "each row gets its own random seed",
            where=f"{where}.options.{_SEED}",
            fix="remove it, and set the recipe's seed",
        )
    for key, value in entry.options.items():
        field = task.options.model_fields.get(key)
        if field is None or get_origin(field.annotation) is not dict or _is_drawn(value):
            _check_drawn(value, f"{where}.options.{key}")
    for options in _extremes(entry.options):
        task.parse(options, f"{where}.options")
    folder = entry.options.get("annotators", ANNOTATORS_FOLDER)
    if task.network and isinstance(folder, str):
        try:
            Networks(Path(folder)).open(task.network)
        except ConfigError as error:
            raise error.at(where) from None


def _is_drawn(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in _KINDS


def _check_drawn(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        return
    kind = next(iter(value), "")
    if len(value) != 1 or kind not in _KINDS:
        raise ConfigError(
            (
                "got an object with the keys "
                f"{', '.join(map(str, value))[:60]}{did_you_mean(str(kind), list(_KINDS))}"
            ),
            where=where,
            expected="{choice: […]}, {uniform: [a, b]} or {integers: [a, b]}",
        )
    items = value[kind]
    numbers = (int,) if kind == "integers" else (int, float)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise ConfigError(f"got {json_type(items)}", where=f"{where}.{kind}", expected="a list with values")
    is_range = (
        len(items) == 2
        and all(isinstance(item, numbers) and not isinstance(item, bool) for item in items)
        and items[0] <= items[1]
    )
    if kind != "choice" and not is_range:
        raise ConfigError(
            f"got {items!r:.60}", where=f"{where}.{kind}", expected="two numbers, the smaller one first"
        )


def _extremes(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield options that together cover every choice and both ends of every range."""
    sides = {
        key: list(next(iter(value.values()))) if _is_drawn(value) else [value]
        for key, value in options.items()
    }
    for number in range(max(map(len, sides.values()), default=1)):
        yield {key: values[min(number, len(values) - 1)] for key, values in sides.items()}


def _drawn(value: Any, generator: np.random.Generator) -> Any:
    if not _is_drawn(value):
        return value
    kind, items = next(iter(value.items()))
    if kind == "choice":
        return items[int(generator.integers(len(items)))]
    if kind == "integers":
        return int(generator.integers(items[0], items[1] + 1))
    return float(generator.uniform(items[0], items[1]))
