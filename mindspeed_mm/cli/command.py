"""Code shared by all verbs: argument parsing, help, and the files that `--config` names."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mindspeed_mm.cli.ranks import Launch, RankConfig, check_here, start_ranks
from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import display_path, read_json_object

_WIDTH = 80
# Not for verbs that read no file and run only briefly.
_EVERY_VERB = (
    ("--set", "--set a.b=value", "override a nested key of these files; flags take precedence"),
    ("--dry-run", "--dry-run", "check everything and stop"),
    ("--print-config", "--print-config", "print the settings as JSON and stop"),
)


@dataclass(frozen=True)
class ConfigFile:
    """A kind of file that `--config` accepts."""

    flag: str  # job flag that receives the file; "" = the positional argument
    what: str
    keys: frozenset[str] = frozenset()  # top-level keys, any of which identifies a JSON as this kind
    suffixes: tuple[str, ...] = (".json",)


TRAINING_FILES = (
    ConfigFile("--mm-model", "model JSON", frozenset({"predictor"})),
    ConfigFile("--mm-data", "data JSON", frozenset({"dataset_param"})),
    ConfigFile("--mm-tool", "tools JSON", frozenset({"sorafeature", "profile", "memory_profile"})),
    ConfigFile("--fsdp2-config-path", "FSDP2 YAML", suffixes=(".yaml", ".yml")),
)


@dataclass(frozen=True)
class Command:
    """A verb: a parser and a `run` function, shared with the script of the same job."""

    verb: str
    summary: str
    usage: str  # the usage line after `vace VERB`
    parser: Callable[[Sequence[str] | None], FlagParser]  # called with the arguments, or with None for help
    run: Callable[[Sequence[str]], object]
    files: tuple[ConfigFile, ...]
    common: Mapping[str, Sequence[str]]  # title → common flags, without leading dashes
    notes: tuple[str, ...] = ()  # extra lines of help
    launch: Launch | None = None
    kept: tuple[str, ...] = field(default=("--local_rank",))  # flags that keep their underscores

    @property
    def prog(self) -> str:
        """The name of the command in errors."""
        return f"vace {self.verb}"


def prepare(command: Command, argv: Sequence[str]) -> Callable[[], object]:
    """Check the arguments against every flag, and return a function that runs the job. Raises ConfigError."""
    words = [_dashed(word, command.kept) for word in argv]
    common, rest = _with_common(FlagParser(command.prog, "", add_help=False), command).parse_known_args(words)
    if common.help or common.help_all:
        sys.stdout.write(full_help(command, rest) if common.help_all else short_help(command))
        return lambda: None
    task_argv = _with_config_files(command, getattr(common, "config_files", None) or [], rest)
    full = _with_common(command.parser(task_argv), command)
    full.parse_strict(task_argv)  # on an error, suggests the nearest flag, including common ones
    ranks = parse(RankConfig, given(common, RankConfig), command.prog) if command.launch else RankConfig()
    if command.launch is None or ranks.nproc is None:
        if ranks != RankConfig():
            raise ConfigError(
                "--nproc N is missing",
                where=command.prog,
                fix="set it to the number of processes on this machine",
            )
        return partial(command.run, task_argv)
    if {"--dry-run", "--print-config"} & set(task_argv):
        check_here(ranks)
        return partial(command.run, task_argv)
    return partial(start_ranks, command.verb, command.launch, ranks, task_argv)


def short_help(command: Command) -> str:
    """Return the flags that are usually set, by group, on one screen."""
    lines = [f"usage: {command.prog} {command.usage}", "", f"{command.summary}.", ""]
    known = command.parser(None).flags()
    if command.files:
        lines += help_row("--config FILE", ", ".join(kind.what for kind in command.files))
    for flag, head, text in _EVERY_VERB:
        lines += help_row(head, text) if flag in known else []
    if command.launch:
        lines += help_row("--nproc N", "one process for each of N devices of this machine")
    if lines[-1]:
        lines.append("")
    for title, flags in command.common.items():
        lines += help_row(title, " ".join(f"--{flag}" for flag in flags))
    if command.notes:
        return "\n".join([*lines, "", *command.notes]) + "\n"
    return "\n".join([*lines, "", f"All flags with their descriptions: {command.prog} --help-all"]) + "\n"


def full_help(command: Command, argv: Sequence[str]) -> str:
    """Return every flag of the job, and the flags of every verb."""
    parser = _with_common(command.parser(argv or None), command)
    parser.usage = f"{command.prog} {command.usage}"
    return parser.format_help()


def help_row(head: str, text: str) -> list[str]:
    """Return the lines of `  head   text`, wrapped to the screen."""
    wrapped = textwrap.wrap(text, _WIDTH - 21, break_on_hyphens=False) or [""]
    return [f"  {head if not number else '':<19}{line}" for number, line in enumerate(wrapped)]


def _dashed(word: str, kept: Sequence[str]) -> str:
    """Convert a flag as the JSON spells it, such as `--num_frames`, to `--num-frames`."""
    name, equals, value = word.partition("=")
    return word if not word.startswith("--") or name in kept else name.replace("_", "-") + equals + value


def _with_common(parser: FlagParser, command: Command) -> FlagParser:
    """Add the flags of every verb to `parser`, and return it."""
    known = parser.flags()
    group = parser.add_argument_group("every verb")
    if command.files:
        group.add_argument(
            "--config",
            dest="config_files",
            action="extend",
            nargs="+" if len(command.files) > 1 else 1,
            metavar="FILE",
            help=", ".join(kind.what for kind in command.files),
        )
    group.add_argument("--help-all", action="store_true", help="every flag")
    if "--help" not in known:
        group.add_argument("-h", "--help", action="store_true", help="the flags that are usually set")
    if command.launch:
        add_flags(parser, RankConfig, "processes")
    return parser


def _with_config_files(command: Command, paths: Sequence[str], rest: Sequence[str]) -> list[str]:
    """Replace `--config FILE…` with the job's own flags, chosen by suffix and top-level keys."""
    found: dict[str, str] = {}
    for path in paths:
        kind = _kind_of(command, path)
        if kind.flag in found:
            raise ConfigError(
                f"--config {display_path(path)} and {display_path(found[kind.flag])} are both {kind.what}",
                where=command.prog,
                fix="add one",
            )
        found[kind.flag] = path
    twice = [flag for flag in found for word in rest if flag and word.partition("=")[0] == flag]
    if twice:
        raise ConfigError(
            f"--config and {twice[0]} both set {_what(command, twice[0])}", where=command.prog, fix="keep one"
        )
    positional = [path for flag, path in found.items() if not flag]
    return [*positional, *rest, *(word for flag, path in found.items() if flag for word in (flag, path))]


def _what(command: Command, flag: str) -> str:
    return next(kind.what for kind in command.files if kind.flag == flag)


def _kind_of(command: Command, path: str) -> ConfigFile:
    suitable = [kind for kind in command.files if Path(path).suffix in kind.suffixes]
    if len(suitable) == 1 and not suitable[0].keys:
        return suitable[0]
    if suitable:
        values = read_json_object(path)
        for kind in suitable:
            if kind.keys & values.keys():
                return kind
    expected = ", ".join(f"{kind.what} ({kind.flag or 'FILE'})" for kind in command.files)
    raise ConfigError(
        "unknown kind of file",
        where=f"{command.prog}: --config {display_path(path)}",
        expected=f"one of {expected}",
        fix="pass it with its own flag",
    )
