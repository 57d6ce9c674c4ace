"""`vace prepare`: makes the src_video, src_mask and references of a task.

The source is a clip or image, or a dataset with a recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mindspeed_mm.conditioning.prepared import describe, file_names, write_prepared
from mindspeed_mm.conditioning.recipe import Recipe, parse_recipe, read_recipe
from mindspeed_mm.conditioning.tasks.catalog import TASKS, all_tasks
from mindspeed_mm.conditioning.tasks.spec import Sources
from mindspeed_mm.config.flags import FlagParser, add_flags, flag_name, given
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.data.manifest import FAILURES, lists_of
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import format_json, regular_file
from mindspeed_mm.limits import usable_cores
from mindspeed_mm.locks import check_unlocked, lock_folder
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_folder, check_not_read

logger = get_logger(__name__)
PROG = "vace prepare"


class PrepareConfig(Config):
    """What to prepare, from which sources, and where to write it."""

    task: str | None = Field(default=None, description="name of the task; --list shows all")
    video: tuple[str, ...] = Field(default=(), description="source clips; may be separated by commas")
    image: tuple[str, ...] = Field(default=(), description="source images; may be separated by commas")
    data: str | None = Field(
        default=None, description="dataset of plain clips: data.json, .jsonl, .csv or data.txt"
    )
    recipe: str | None = Field(
        default=None,
        description="YAML with tasks, weights and a seed; without it, --task is applied to every clip",
    )
    out: str = Field(default="prepared", description="folder of the results")
    num_workers: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="number of worker processes for a dataset; null = one per core",
    )
    sample_timeout: float = Field(
        default=3600.0, gt=0, le=1e6, description="timeout of one sample in seconds"
    )
    options: str | None = Field(default=None, description="JSON or YAML with the task's options")
    list: bool = Field(default=False, description="list all tasks with their inputs and options, and stop")
    dry_run: bool = Field(default=False, description="check sources and options, and stop")
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Prepare one task's inputs. On bad input, print one line, exit with 1 and leave no partial files."""
    words = [_canonical(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments = job_parser(prog).parse_strict(words)
    config = parse(PrepareConfig, given(arguments, PrepareConfig), prog)
    if config.list:
        logger.info(task_table())
        return
    values = {} if config.options is None else read_yaml(config.options)
    if not isinstance(values, Mapping):
        raise ConfigError("got no object", where=str(config.options), expected="the options of the task")
    flags = {key: _plain(value) for key, value in vars(arguments).items() if key in option_names()}
    if config.print_config:
        logger.info(format_json({**config.model_dump(mode="json"), "options": {**values, **flags}}, indent=2))
        return
    if config.data is not None:
        _prepare_dataset(config, {**values, **flags}, prog)
        return
    if config.recipe is not None:
        raise ConfigError("needs a dataset", where=f"{prog}: --recipe", fix="set it with --data")
    if config.task is None:
        raise ConfigError("missing", where=f"{prog}: --task", fix=f"choose a task; {prog} --list shows all")
    entry = TASKS.get(config.task)
    options = entry.parse({**values, **flags}, f"{prog} --task {entry.name}")
    videos, images = _split(config.video), _split(config.image)
    for path in (*videos, *images):
        regular_file(path, DataError, or_folder=True)
    check_folder(config.out, "--out")
    prepared = entry.prepare(Sources.open(videos, images), options)
    targets = [Path(config.out) / name for name in file_names(prepared)]
    check_not_read(targets, _inputs([*videos, *images], options, config.options), "--out")
    for note in prepared.notes:
        logger.info(note)
    if config.dry_run:
        logger.info(f"{entry.name}: {describe(prepared)} would be written to {config.out}")
        return
    settings = {
        "task": entry.name,
        "options": options.model_dump(mode="json"),
        "videos": videos,
        "images": images,
        "notes": list(prepared.notes),
        "networks": dict(prepared.networks),
    }
    with lock_folder(Path(config.out), choose="--out"):
        files = write_prepared(prepared, Path(config.out), settings)
    logger.info(f"{entry.name}: {describe(prepared)} -> {', '.join(str(path) for path in files)}")


def _inputs(sources: Sequence[str], options: Config, options_path: str | None) -> Iterator[str | Path]:
    """Yield every file that a task reads. May include option values that are not paths."""
    for path in sources:
        yield path
        if Path(path).is_dir():
            yield from Path(path).iterdir()
    yield from (value for value in options.model_dump().values() if isinstance(value, str))
    if options_path is not None:
        yield options_path


def _prepare_dataset(config: PrepareConfig, options: Mapping[str, Any], prog: str) -> None:
    """Prepare every unfinished sample of the dataset."""
    from mindspeed_mm.tasks.prepare_dataset import LISTING, plan_samples, prepare_dataset

    for flag, values in (("--video", config.video), ("--image", config.image)):
        if values:
            raise ConfigError("cannot be used with --data", where=f"{prog}: {flag}", fix="remove one of them")
    recipe = _recipe(config, options, prog)
    check_folder(config.out, "--out")
    check_unlocked(Path(config.out), choose="--out")
    check_not_read(
        [Path(config.out) / name for name in (LISTING, FAILURES)], lists_of(str(config.data)), "--out"
    )
    plan = plan_samples(str(config.data), recipe)
    for note in plan.notes:
        logger.info(note)
    logger.info(plan.describe())
    if config.dry_run:
        return
    workers = usable_cores() if config.num_workers is None else config.num_workers
    files = prepare_dataset(plan, Path(config.out), num_workers=workers, timeout=config.sample_timeout)
    logger.info(f"{plan.describe()} -> {', '.join(map(str, files))}")


def _recipe(config: PrepareConfig, options: Mapping[str, Any], prog: str) -> Recipe:
    if config.recipe is None:
        if config.task is None:
            raise ConfigError(
                "missing", where=f"{prog}: --recipe", fix="pass a recipe, or one task with --task"
            )
        seed = options.get("seed", 0)
        entry = {"options": {key: value for key, value in options.items() if key != "seed"}}
        try:
            return parse_recipe({"seed": int(seed), "tasks": {config.task: entry}}, f"{prog} --task")
        except ValueError:
            raise ConfigError(f"got {seed!r}", where=f"{prog}: --seed", expected="an integer") from None
    given_too = ["task"] * (config.task is not None) + sorted(options)
    if given_too:
        raise ConfigError(
            "cannot be used with --recipe",
            where=f"{prog}: {flag_name(given_too[0])}",
            fix="write it into the recipe",
        )
    return read_recipe(config.recipe)


def job_parser(prog: str = PROG) -> FlagParser:
    """Build the parser with the flags of the job and one flag for each task option."""
    parser = FlagParser(prog, "Make src_video, src_mask and references of a VACE task from clips and images.")
    add_flags(parser, PrepareConfig, "job")
    parser.add_argument("--pre-save-dir", dest="out", default=argparse.SUPPRESS, help="the same as --out")
    group = parser.add_argument_group("options of tasks; --list shows the options of each task")
    helps: dict[str, str] = {}
    for entry in all_tasks():
        for name, field in entry.options.model_fields.items():
            helps.setdefault(name, field.description or "")
    for name, text in sorted(helps.items()):
        group.add_argument(flag_name(name), nargs="+", default=argparse.SUPPRESS, metavar="VALUE", help=text)
    return parser


def option_names() -> set[str]:
    """Return the names of the options of all tasks."""
    return {name for entry in all_tasks() for name in entry.options.model_fields}


def task_table() -> str:
    """Return the list of tasks: for each, a line with its name, inputs and result, then its options."""
    lines = []
    for entry in all_tasks():
        needs = [*entry.needs, *([f"{entry.network} network"] if entry.network else [])]
        lines.append(f"{entry.name:<22}{', '.join(needs) or '-':<30}{entry.summary}")
        names = [name for name in entry.options.model_fields if name not in entry.fixed]
        lines.append(f"{'':<52}{' '.join(map(flag_name, names))}")
    return "\n".join(lines)


def _canonical(word: str) -> str:
    """Convert a flag as the published tool spells it, such as `--expand_num`, to `--expand-num`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _split(paths: Sequence[str]) -> list[str]:
    """Split `a.mp4,b.mp4` into two paths, unless a file has this name."""
    found = []
    for path in paths:
        found += [path] if Path(path).exists() else [part.strip() for part in path.split(",")]
    return found
