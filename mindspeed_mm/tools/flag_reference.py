"""Write docs/reference/flags.md from the fields that define the flags.

`python -m mindspeed_mm.tools.flag_reference`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from megatron.mm.arguments import REFUSED, UNUSED
from mindspeed_mm.config.flags import flag_name
from mindspeed_mm.config.names import names_of
from mindspeed_mm.config.schema import Config
from mindspeed_mm.tasks.jobs.pretrain import SCHEMAS

HEAD = """# Flags of `pretrain_vace.py`

Written by `python -m mindspeed_mm.tools.flag_reference docs/reference/flags.md` from the code; do not edit by
hand.

A flag has one of three fates: it is **honoured** (the tables below), **accepted and unused** (the table after
them; the log says so once, with the reason), or **refused**: any other flag ends the command with one line
that names the nearest flag, or, for those of the last table, what to do.
Abbreviations are refused too. Defaults are Megatron core 0.12's; the scripts under `examples/vace/` carry the
recipe.

Refused values: `--tensor-model-parallel-size` other than 1 (use `--use-torch-fsdp2` or pipeline stages for
memory and `--context-parallel-size` for long clips).
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for schema, title in SCHEMAS:
        parts.append(
            f"\n## {title.capitalize()}\n\n| flag | default | meaning |\n|-|-|-|\n" + "".join(_rows(schema))
        )
    rows = "".join(
        f"| `{flag}` | {reason} |\n"
        for flag, (_, reason) in sorted(UNUSED.items())
        if flag not in _honoured()
    )
    refused = "".join(f"| `{flag}` | {advice} |\n" for flag, advice in sorted(REFUSED.items()))
    parts += ["\n## Accepted, unused\n\n| flag | why it does nothing here |\n|-|-|\n", rows]
    return "".join([*parts, "\n## Refused with advice\n\n| flag | what to do |\n|-|-|\n", refused])


def _rows(schema: type[Config]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        choices = names_of(field) or _choices(field.annotation)
        meaning = " ".join(
            filter(None, [field.description or "", f"({', '.join(choices)})" if choices else ""])
        )
        yield f"| `{flag_name(name)}` | {_default(field.default)} | {meaning.replace('|', '/')} |\n"


def _choices(annotation: Any) -> list[str]:
    found: list[str] = []
    for inner in get_args(annotation):
        found += [inner] if isinstance(inner, str) else _choices(inner)
    return found


def _default(value: Any) -> str:
    if value is None or value is False or value == "":
        return ""
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"


def _honoured() -> set[str]:
    return {flag_name(name) for schema, _ in SCHEMAS for name in schema.model_fields}


def main(argv: list[str]) -> None:
    """Write the page to argv[0], or to stdout."""
    if argv:
        Path(argv[0]).write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main(sys.argv[1:])
