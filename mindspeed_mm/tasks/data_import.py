"""`vace data import`: converts a dataset in another project's layout to data.json and data.txt.

Does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.data.foreign import find_list
from mindspeed_mm.data.manifest import list_problems, lists_of, scan_manifest
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.files import display_path, format_json, write_json, write_text
from mindspeed_mm.locks import lock_folder
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.outputs import check_file, check_folder, check_not_read
from mindspeed_mm.text_encoding import split_lines

logger = get_logger(__name__)
PROG = "vace data import"


class ImportConfig(Config):
    """How to read a dataset, and where to write the lists."""

    data_folder: str | None = Field(
        default=None, description="folder that paths in the list are relative to (default: that of the list)"
    )
    out: str = Field(default="imported", description="folder for data.json and data.txt (default: imported)")
    skip_bad_samples: int = Field(default=0, ge=0, description="maximum number of unusable rows to skip")
    dry_run: bool = Field(default=False, description="read the dataset and stop")
    print_config: bool = Field(default=False, description="print the settings as JSON and stop")


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Write the lists. If a row is unusable, print one line, exit with 1 and write nothing."""
    arguments = import_parser(prog).parse_strict(argv)
    config = parse(ImportConfig, given(arguments, ImportConfig), prog)
    if config.print_config:
        logger.info(format_json({"source": arguments.source, **config.model_dump(mode="json")}, indent=2))
        return
    home = home_of(Path(arguments.source), config.data_folder)
    check_folder(config.out, "--out")
    out = Path(config.out)
    targets = [out / "data.json", out / "data.txt"]
    for target in targets:
        check_file(target, "--out")
    line = line_of(home, targets[0])
    reject_reimport(Path(arguments.source), targets, line)
    lists = lists_of(arguments.source, home)
    check_not_read(targets, lists, "--out")
    manifest = scan_manifest(arguments.source, home)
    if os.path.isdir(lists[-1]):  # a folder of clips, each with a caption file
        check_not_read(targets, (row.video.with_suffix(".txt") for row in manifest.records), "--out")
    for note in manifest.notes:
        logger.info(note)
    bad = len({problem.row for problem in manifest.problems})
    if bad:
        message = list_problems(manifest.problems, manifest.rows)
        if bad > config.skip_bad_samples or bad == manifest.rows:
            hint = "" if bad == manifest.rows else f", or skip them with --skip-bad-samples {bad}"
            raise DataError(message, fix=f"correct them{hint}")
        logger.warning(message)
    rows = [guide_row(record, home) for record in manifest.records]
    given_keys = {key: sum(row[key] is not None for row in rows) for key in list(rows[0])[2:]}
    counts = ", ".join(f"{count} with {key}" for key, count in given_keys.items() if count) or "plain clips"
    if config.dry_run:
        logger.info(f"{len(rows)} rows ({counts}) would be written to {config.out}")
        return
    with lock_folder(out, choose="--out"):
        write_json(out / "data.json", rows)
        write_text(out / "data.txt", f"{line}\n")
    logger.info(f"{len(rows)} rows ({counts}) -> {out / 'data.json'}; set data_path to {out / 'data.txt'}")


def reject_reimport(source: Path, targets: Sequence[Path], line: str) -> None:
    """Raise ConfigError if an earlier import of this folder wrote its lists to the folder itself."""
    listing, pointer = targets
    if not os.path.isdir(source) or not os.path.exists(listing) or not os.path.isfile(pointer):
        return
    found = find_list(source)
    if found is None or not os.path.samefile(found, listing):
        return
    if pointer.read_text(encoding="utf-8", errors="replace").strip() == line:
        raise ConfigError(
            f"{display_path(listing)} is the result of an earlier import, and is read instead of the clips",
            where=f"{PROG}: --out",
            fix=(
                f"set data_path to {display_path(pointer)}; to import the clips again, delete "
                f"{display_path(listing)} and {display_path(pointer)} first"
            ),
        )


def home_of(source: Path, data_folder: str | None) -> Path:
    """Return the folder that the paths of the rows are relative to. Raises ConfigError."""
    if source.name.endswith(".txt"):
        raise ConfigError(
            "got a data.txt", where=PROG, expected="one list or folder", fix="pass the list that it names"
        )
    if data_folder is not None:
        if not os.path.isdir(data_folder):
            raise ConfigError(f"{data_folder}: no such folder", where=f"{PROG}: --data-folder")
        return Path(data_folder)
    if os.path.isdir(source):
        return (find_list(source) or source / "any").parent
    return source.parent


def guide_row(record: SampleRecord, home: Path) -> dict[str, Any]:
    """Convert a record to a row of data.json, with paths relative to `home`."""

    def path(file: Path | None) -> str | None:
        return None if file is None else path_from(home, file)

    captions = record.captions
    return {
        "video": path(record.video),
        "cap": captions[0] if len(captions) == 1 else list(captions),
        "src_video": path(record.src_video),
        "src_ref_images": [path(image) for image in record.src_ref_images] or None,
        "src_video_mask": path(record.src_mask),
    }


def path_from(home: Path, file: Path) -> str:
    """Return the path of `file` relative to `home`.

    If the path of `file` does not start with `home`, links are resolved first, as in data.txt.
    """
    if file.is_relative_to(home) and ".." not in file.relative_to(home).parts:
        return str(file.relative_to(home))
    return os.path.relpath(Path(os.path.realpath(file.parent)) / file.name, os.path.realpath(home))


def line_of(home: Path, listing: Path) -> str:
    """Return the line for data.txt. Raises ConfigError for a path that could not be read back."""
    parts = [str(home.resolve()), str(listing.resolve())]
    for part, where, expected, fix in (
        (parts[0], "SOURCE", "a path without line breaks", "rename the folder"),
        (parts[1], "--out", "a path without commas and line breaks", "choose another folder"),
    ):
        whole = split_lines(part) == [part] and part.strip() == part
        if not whole or ("," in part and part == parts[1]):
            raise ConfigError(
                f"got {part!r}, which data.txt cannot store",
                where=f"{PROG}: {where}",
                expected=expected,
                fix=fix,
            )
    return ",".join(parts)


def import_parser(prog: str = PROG) -> FlagParser:
    """Build the command's parser."""
    parser = FlagParser(prog, "Read a dataset in another project's layout and write the lists of the guide.")
    parser.add_argument("action", choices=["import"], metavar="import")
    parser.add_argument(
        "source", metavar="SOURCE", help="metadata.csv, .json or .jsonl, or a folder of clips"
    )
    add_flags(parser, ImportConfig, "job")
    return parser
