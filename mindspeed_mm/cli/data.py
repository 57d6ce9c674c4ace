"""`vace data import` and `vace data split`: make datasets from other projects' data and from long files."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_mm.cli.command import Command, help_row
from mindspeed_mm.config.flags import FlagParser
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.log import one_line_errors
from mindspeed_mm.registry import did_you_mean
from mindspeed_mm.tasks import data_import, data_split

PROG = "vace data"
ACTIONS = {
    "import": (data_import.import_parser, data_import.main),
    "split": (data_split.split_parser, data_split.main),
}


def _action(argv: Sequence[str]) -> str:
    name = argv[0] if argv else ""
    if name not in ACTIONS:
        got = f"got {name[:40]!r}{did_you_mean(name, list(ACTIONS))}" if name else "got none"
        raise ConfigError(got, where=PROG, expected=f"an action first: {', '.join(ACTIONS)}")
    return name


def _parser(argv: Sequence[str] | None) -> FlagParser:
    name = "import" if argv is None else _action(argv)
    return ACTIONS[name][0](f"{PROG} {name}")


@one_line_errors
def _run(argv: Sequence[str]) -> None:
    name = _action(argv)
    ACTIONS[name][1](argv, f"{PROG} {name}")


COMMAND = Command(
    verb="data",
    summary="Read datasets of other projects; cut long files into scenes",
    usage="import SOURCE | split CLIP... [--key value]...",
    parser=_parser,
    run=_run,
    files=(),
    common={"import": ("data-folder", "out", "skip-bad-samples"), "both": ("dry-run",)},
    notes=(
        "SOURCE",
        *help_row("metadata.csv/.json", "DiffSynth-Studio, VideoX-Fun"),
        *help_row("FOLDER", "name.mp4 next to name.txt; or orig, cropped, mask, prompt"),
        "",
        "Every flag of an action: vace data split --help-all",
    ),
)
