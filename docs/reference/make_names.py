"""Writes docs/reference/names.md from the key tables: `python docs/reference/make_names.py`. A test checks that it is current."""

from __future__ import annotations

from math import prod
from pathlib import Path

from mindspeed_mm.models.wan.config import PRESETS
from mindspeed_mm.models.wan.sizes import layout
from mindspeed_mm.models.wan.state_dict import spellings

PAGE = Path(__file__).with_name("names.md")
HEAD = """# Names of the weights

Written by `python docs/reference/make_names.py` from `mindspeed_mm/models/wan/state_dict.py`; do not edit.

The first column is the name in the published Wan and VACE files, and inside this library. `{i}` is a block's number, `{p}` is
`weight` or `bias`, `{qkv}` is `q`, `k` or `v`. Names under `wan_dit.` are the trunk's, under `vace_dit.` the branch's.
"""


def page() -> str:
    """The text of names.md."""
    rows = ["| original (ours) | diffusers | MM |", "|---|---|---|"]
    rows += [f"| `{row.official}` | `{row.diffusers}` | `{row.mm}` |" for row in spellings()]
    sizes = [
        "| model | weights | parameters of the trunk | of the branch | vace_layers |",
        "|---|---|---|---|---|",
    ]
    for name, config in PRESETS.items():
        shapes = layout(config)
        branch = sum(prod(shape) for weight, shape in shapes.items() if weight.startswith("vace_"))
        trunk = sum(map(prod, shapes.values())) - branch
        layers = config.vace_layers
        sizes.append(
            f"| {name} | {len(shapes)} | {trunk:,} | {branch:,} | {layers[0]}, {layers[1]}, …, {layers[-1]} |"
        )
    return "\n".join(
        [HEAD, *rows, "", "## How many", "", *sizes, "", "Wan2.2-VACE-A14B has two such experts.", ""]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
