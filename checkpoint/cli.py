"""mm-convert: `mm-convert VACEConverter hf_to_mm --cfg.source_path … --cfg.target_path …`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, auto_cli

from checkpoint.converter import CONVERTERS
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.log import one_line_errors
from mindspeed_mm.registry import did_you_mean

_OBJECT = re.compile(r"<(?:function|class) '?([\w.]+)'?(?: at 0x[0-9a-f]+)?>")
_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.]+)|invalid choice: '(\w+)'", re.IGNORECASE)
ALIASES = {
    "--pp_layers": "--cfg.target_parallel_config.pp_layers",  # as spelled in the guide's table
    "--print-config": "--print_config",  # as spelled by all other commands
}


class OneLineParser(ArgumentParser):
    """A parser whose errors are ConfigErrors: one line, exit code 1."""

    def format_help(self, *formatter: Any) -> str:  # parameters differ between releases of jsonargparse
        """Show the first docstring line of functions and classes instead of `<function …>`.

        jsonargparse prints the latter if no docstring parser is installed.
        """
        return _OBJECT.sub(
            lambda match: _summaries().get(match[1].rsplit(".")[-1], match[1]),
            super().format_help(*formatter),
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ConfigError with the problem and the most similar known flag or word."""
        command = " ".join(word for word in self.prog.split() if word != "[options]")
        text = " ".join(message.split()).replace('Parser key "', '"--')
        text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
        unknown = _UNKNOWN.search(text)
        near = did_you_mean(unknown[1] or unknown[2], self._known()) if unknown else ""
        raise ConfigError(f"{text[:300]}{near}", where=command, fix=f"see {command} --help")

    def _known(self) -> list[str]:
        words = [
            word for action in self._actions for word in (*action.option_strings, *(action.choices or ()))
        ]
        return [str(word) for word in words]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. On bad input, prints one line and exits with 1."""
    _run(sys.argv[1:] if argv is None else list(argv))


def _summaries() -> dict[str, str]:
    """Map the name of each method and config to the first line of its docstring."""
    methods = [method for name in CONVERTERS for method in CONVERTERS.get(name).methods.values()]
    configs = [parameter for method in methods for parameter in get_type_hints(method).values()]
    return {
        thing.__name__: (inspect.getdoc(thing) or "").partition("\n")[0].rstrip(".")
        for thing in methods + configs
    }


@one_line_errors
def _run(argv: list[str]) -> None:
    components: dict[str, Any] = {name: dict(CONVERTERS.get(name).methods) for name in CONVERTERS}
    args = [_spelled_out(word) for word in argv]
    auto_cli(components, args=args, parser_class=OneLineParser, prog="mm-convert")


def _spelled_out(word: str) -> str:
    flag, equals, value = word.partition("=")
    if value == "--":  # argparse would drop it
        raise ConfigError("got '--'", where=f"mm-convert: {flag}", expected="a value")
    return f"{ALIASES.get(flag, flag)}{equals}{value}"
