"""`vace convert METHOD`: the methods of mm-convert, with their config fields as plain flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from checkpoint.converter import CONVERTERS
from mindspeed_mm.cli.command import Command, ConfigFile, help_row
from mindspeed_mm.config.flags import FlagParser, add_flags, given, is_config
from mindspeed_mm.config.overrides import Overrides
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import format_json, json_type
from mindspeed_mm.log import get_logger, one_line_errors
from mindspeed_mm.registry import did_you_mean

PROG = "vace convert"
DEFAULT = "VACEConverter"
logger = get_logger(__name__)


@dataclass(frozen=True)
class _Method:
    words: tuple[str, ...]  # the words on the command line that name it
    convert: Callable[[Any], None]
    schema: type[Config]

    @property
    def nested(self) -> dict[str, type[Config]]:
        """The fields that are configs themselves. Their own fields become flags, too."""
        hints = {name: field.annotation for name, field in self.schema.model_fields.items()}
        return {name: hint for name, hint in hints.items() if is_config(hint)}


def _find(argv: Sequence[str]) -> _Method:
    """Return the method that `argv` starts with: `METHOD` or `CONVERTER METHOD`. Raises ConfigError."""
    words = [word for word in argv[:2] if not word.startswith("-")]
    named = bool(words) and words[0] in CONVERTERS
    methods = CONVERTERS.get(words[0] if named else DEFAULT).methods
    used = words[: 1 + named]
    name = used[-1] if len(used) == 1 + named else ""
    if name not in methods:
        got = f"got {name[:40]!r}{did_you_mean(name, list(methods))}" if name else "got none"
        raise ConfigError(got, where=PROG, expected=f"a method first: {', '.join(methods)}")
    hints = get_type_hints(methods[name]).values()
    schema = next((hint for hint in hints if is_config(hint)), None)
    if schema is None:
        raise ConfigError(
            "its settings are not a Config of this package", where=f"{PROG} {name}", fix="use mm-convert"
        )
    return _Method(tuple(used), methods[name], schema)


def _parser(argv: Sequence[str] | None) -> FlagParser:
    method = _find(["hf_to_mm"] if argv is None else argv)  # without arguments (help): a typical method
    summary = (method.convert.__doc__ or "").strip().partition("\n")[0]
    parser = FlagParser(PROG, summary)
    parser.add_argument("method", nargs=len(method.words), metavar="METHOD", help=" ".join(method.words))
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--config-file", metavar="FILE", help="JSON or YAML with the keys below (alias: --config)"
    )
    group.add_argument("--print-config", action="store_true", help="print the settings as JSON, and exit")
    group.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="override a key in the file; may be repeated"
    )
    add_flags(parser, method.schema, "conversion")
    for name, part in method.nested.items():
        add_flags(parser, part, name.replace("_", " "))
    return parser


def read_config(argv: Sequence[str]) -> Config:
    """Return the settings of a method from the file, then `--set`, then flags. Later ones win.

    Raises ConfigError.
    """
    method = _find(argv)
    namespace = _parser(argv).parse_strict(argv)
    path = namespace.config_file
    values = Overrides.parse(namespace.set or ()).apply((read_yaml(path) or {}) if path else {})
    if not isinstance(values, dict):
        raise ConfigError(
            f"got {json_type(values)}", where=path, expected="an object with keys such as source_path"
        )
    values = {**values, **given(namespace, method.schema)}
    for name, part in method.nested.items():
        if found := given(namespace, part):
            before = values.get(name)
            values[name] = {**(before if isinstance(before, dict) else {}), **found}
    return parse(method.schema, values, path or f"{PROG} {' '.join(method.words)}")


@one_line_errors
def _run(argv: Sequence[str]) -> None:
    config = read_config(argv)
    if "--print-config" in argv:
        logger.info(format_json(config.model_dump(mode="json"), indent=2))
        return
    _find(argv).convert(config)


COMMAND = Command(
    verb="convert",
    summary="Convert weights: rename, re-split into pipeline stages, or merge",
    usage="METHOD --source-path PATH --target-path PATH ...",
    parser=_parser,
    run=_run,
    files=(
        ConfigFile("--config-file", "JSON or YAML with the settings", suffixes=(".json", ".yaml", ".yml")),
    ),
    common={
        "every method": ("source-path", "target-path", "dtype", "verify", "base-path"),
        "to MM folders": ("pp-layers",),
    },
    notes=(
        "METHOD",
        *help_row("hf_to_mm", "original Wan names to an MM folder"),
        *help_row("hf_diffusers_to_mm", "diffusers names to an MM folder"),
        *help_row("mm_to_hf", "MM or a training checkpoint to original Wan names"),
        *help_row("mm_to_hf_diffusers", "MM or a training checkpoint to diffusers names"),
        *help_row("resplit", "MM to MM with different pipeline stages"),
        *help_row("dcp_to_torch", "a training checkpoint to one torch file"),
        *help_row("assemble_pipeline", "components to a complete diffusers pipeline"),
        *help_row("merge_lora", "a base and LoRAs to merged weights (reverse: extract_lora)"),
        *help_row("lora_to_…", "a LoRA to peft, comfyui (comfy), diffusers or hf"),
        "",
        "Every flag of a method: vace convert METHOD --help-all",
    ),
)
