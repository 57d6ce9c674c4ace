"""`vace VERB …`: one command for the jobs of the scripts, mm-convert and mm-inspect.

The module of a verb is imported when the verb is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.log import one_line_errors
from mindspeed_mm.registry import did_you_mean

VERBS: Mapping[str, str] = {
    "init": "create a folder with the scripts and settings of a model",
    "doctor": "check whether this machine is ready",
    "convert": "convert weights: names, pipeline stages, one file",
    "data": "read datasets of other projects, cut long files into scenes",
    "prepare": "make the inputs of a VACE task from plain clips and images",
    "inspect": "draw what the model sees of a dataset or a feature",
    "extract": "encode clips, masks, references and captions as features",
    "plan": "estimate the memory and time of a run before its launch",
    "train": "pre-train or fine-tune on features",
    "generate": "generate videos from a JSON with weights, prompts and inputs",
    "eval": "score generated videos, and compare runs",
    "serve": "serve a model over an HTTP API",
    "ui": "edit videos in the browser",
}
ALIASES = {"preproccess": "prepare", "vace_preproccess": "prepare"}  # the published tool's spelling
HELP = """\
usage: vace VERB [--key value]... [--config FILE]... [--set a.b=value]...

VACE video models: convert weights, extract features, train, generate.
verbs, in the order of a project
{verbs}

for every verb
  --config FILE    a JSON or YAML file of the verb, identified by its keys
  --set a.b=value  override a nested key of such a file; flags take precedence
  --dry-run        check everything and stop; --print-config prints the settings
  --nproc N        one process for each of N devices (extract, train, generate)
  --help           the flags that are usually set; --help-all: every flag
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. On bad input, print one line and exit with 1."""
    _prepare(sys.argv[1:] if argv is None else list(argv))()


@one_line_errors
def _prepare(argv: list[str]) -> Callable[[], object]:
    """Check the arguments, and return the function to run.

    That function is called outside `one_line_errors`, because the task and the launcher handle signals.
    """
    if not argv or argv[0] in ("-h", "--help", "--help-all"):
        sys.stdout.write(help_text())
        return lambda: None
    verb, *rest = argv
    verb = ALIASES.get(verb, verb)
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb {verb[:40]!r}{did_you_mean(verb, list(VERBS))}",
            where="vace",
            fix="see vace --help",
        )
    from mindspeed_mm.cli.command import prepare

    return prepare(import_module(f"mindspeed_mm.cli.{verb}").COMMAND, rest)


def help_text() -> str:
    """Return the text of `vace --help`, which fits on one screen."""
    return HELP.format(verbs="\n".join(f"  {name:<10}{summary}" for name, summary in VERBS.items()))
