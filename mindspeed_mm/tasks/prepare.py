"""One VACE task from clips and images: src_video, src_mask and references as files that generation and extraction read."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from mindspeed_mm.conditioning.annotate.opencv import Frame, as_rgb
from mindspeed_mm.conditioning.annotate.spool import Spool
from mindspeed_mm.conditioning.tasks.catalog import TASKS, all_tasks
from mindspeed_mm.conditioning.tasks.spec import Prepared, Sources
from mindspeed_mm.config.flags import FlagParser, add_flags, flag_name, given
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.data.video import write_video
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import format_json, regular_file, write_json
from mindspeed_mm.locks import lock_folder, temporary_name
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_folder

logger = get_logger(__name__)
PROG = "vace prepare"


class PrepareConfig(Config):
    """What to prepare, from what, and where it goes."""

    task: str | None = Field(default=None, description="name of the task; --list shows all")
    video: tuple[str, ...] = Field(default=(), description="source clips; several: also A,B")
    image: tuple[str, ...] = Field(default=(), description="source images; several: also A,B")
    out: str = Field(default="prepared", description="folder of the results")
    options: str | None = Field(default=None, description="JSON or YAML with the task's options")
    list: bool = Field(default=False, description="all tasks, what they need, one line each")
    dry_run: bool = Field(default=False, description="check sources and options, and stop")
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")


@one_line_errors
def main(argv: Sequence[str] | None = None, prog: str = PROG) -> None:
    """Prepare one task's inputs. Exits with 1 and one line on bad input; nothing is left half written."""
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
    if config.task is None:
        raise ConfigError("missing", where=f"{prog}: --task", fix=f"name a task; {prog} --list shows all")
    entry = TASKS.get(config.task)
    options = entry.parse({**values, **flags}, f"{prog} --task {entry.name}")
    videos, images = _split(config.video), _split(config.image)
    for path in (*videos, *images):
        regular_file(path, DataError, or_folder=True)
    check_folder(config.out, "--out")
    prepared = entry.prepare(Sources.open(videos, images), options)
    for note in prepared.notes:
        logger.info(note)
    if config.dry_run:
        logger.info(f"{entry.name}: {describe(prepared)} would be written to {config.out}")
        return
    said = {
        "task": entry.name,
        "options": options.model_dump(mode="json"),
        "videos": videos,
        "images": images,
        "notes": list(prepared.notes),
        "networks": dict(prepared.networks),
    }
    with lock_folder(Path(config.out), choose="--out"):
        files = write_prepared(prepared, Path(config.out), said)
    logger.info(f"{entry.name}: {describe(prepared)} -> {', '.join(str(path) for path in files)}")


def job_parser(prog: str = PROG) -> FlagParser:
    """The flags of the job, and one for each option that a task has."""
    parser = FlagParser(prog, "Make src_video, src_mask and references of a VACE task from clips and images.")
    add_flags(parser, PrepareConfig, "job")
    parser.add_argument("--pre-save-dir", dest="out", default=argparse.SUPPRESS, help="the same as --out")
    group = parser.add_argument_group("options of tasks; which one has which: --list")
    helps: dict[str, str] = {}
    for entry in all_tasks():
        for name, field in entry.options.model_fields.items():
            helps.setdefault(name, field.description or "")
    for name, text in sorted(helps.items()):
        group.add_argument(flag_name(name), nargs="+", default=argparse.SUPPRESS, metavar="VALUE", help=text)
    return parser


def option_names() -> set[str]:
    """Every option of any task."""
    return {name for entry in all_tasks() for name in entry.options.model_fields}


def task_table() -> str:
    """One line a task: name, what it needs, what it makes; then its options."""
    lines = []
    for entry in all_tasks():
        needs = [*entry.needs, *([f"{entry.network} network"] if entry.network else [])]
        lines.append(f"{entry.name:<22}{', '.join(needs) or '-':<24}{entry.summary}")
        names = [name for name in entry.options.model_fields if name not in entry.fixed]
        lines.append(f"{'':<46}{' '.join(map(flag_name, names))}")
    return "\n".join(lines)


def describe(prepared: Prepared) -> str:
    """`81 frames of 832x480 at 16 fps, 2 references`."""
    parts = []
    if prepared.steps is not None:
        height, width = prepared.size
        parts.append(f"{prepared.num_frames} frames of {width}x{height} at {prepared.fps:g} fps")
    if prepared.references:
        parts.append(f"{len(prepared.references)} reference(s)")
    return ", ".join(parts)


def write_prepared(prepared: Prepared, folder: Path, said: Mapping[str, Any]) -> list[Path]:
    """src_video, src_mask (FFV1, lossless), reference_N.png and prepare.json in `folder`, all or none. Raises DataError.

    src_video is an mp4; a single frame and its mask are PNGs; odd sizes, which H.264 lacks, are lossless .mkv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / temporary_name("prepared")
    try:
        draft.mkdir()
        names = _write_clip(prepared, draft)
        for number, reference in enumerate(prepared.references):
            Image.fromarray(reference).save(draft / f"reference_{number}.png")
        references = [f"reference_{number}.png" for number in range(len(prepared.references))]
        write_json(draft / "prepare.json", {**said, **names, "src_ref_images": references})
        written = []
        for path in sorted(draft.iterdir()):
            os.replace(path, folder / path.name)
            written.append(folder / path.name)
        return written
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror or error}",
            where=folder,
            fix="make room or choose another --out",
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_clip(prepared: Prepared, folder: Path) -> dict[str, str]:
    """The names of the files by their keys. Masks wait in a spool while the clip is encoded: one pass over the source."""
    if prepared.steps is None:
        return {}
    odd = prepared.size[0] % 2 or prepared.size[1] % 2
    with Spool() as masks:

        def frames() -> Iterator[Frame]:
            for frame, mask in prepared.read():
                if mask is not None:
                    masks.add(mask)
                yield frame

        if prepared.num_frames == 1:
            Image.fromarray(next(frames())).save(folder / "src_video.png")
            names = {"src_video": "src_video.png"}
        else:
            path = folder / ("src_video.mkv" if odd else "src_video.mp4")
            names = {"src_video": write_video(path, frames(), prepared.fps, lossless=bool(odd)).name}
        if not masks.count:
            return names
        if prepared.num_frames == 1:
            Image.fromarray(next(iter(masks))).save(folder / "src_mask.png")
            return {**names, "src_mask": "src_mask.png"}
        mask_path = folder / "src_mask.mkv"
        write_video(mask_path, (as_rgb(mask) for mask in masks), prepared.fps, lossless=True)
        return {**names, "src_mask": mask_path.name}


def _canonical(word: str) -> str:
    """`--expand_num`, as the published tool spells flags, is `--expand-num`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _split(paths: Sequence[str]) -> list[str]:
    """`a.mp4,b.mp4` as two, unless a file has this name."""
    found = []
    for path in paths:
        found += [path] if Path(path).exists() else [part.strip() for part in path.split(",")]
    return found
