"""Weight names in each dialect: official (also used internally), diffusers and MM. One table, used in both
directions.
Note: diffusers' top-level `proj_out` is the head, but `vace_blocks.n.proj_out` is after_proj; diffusers'
`norm2` is the official `norm3`. The first component of a name decides between trunk and branch, never a
substring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mindspeed_mm.models.keymap import KeyMap, Rename


class Spelling(NamedTuple):
    """The name of one weight (or family of weights) in the three dialects."""

    official: str
    diffusers: str
    mm: str


TRUNK = (
    Spelling("patch_embedding.{p}", "patch_embedding.{p}", "patch_embedding.{p}"),
    Spelling(
        "text_embedding.0.{p}", "condition_embedder.text_embedder.linear_1.{p}", "text_embedding.linear_1.{p}"
    ),
    Spelling(
        "text_embedding.2.{p}", "condition_embedder.text_embedder.linear_2.{p}", "text_embedding.linear_2.{p}"
    ),
    Spelling("time_embedding.0.{p}", "condition_embedder.time_embedder.linear_1.{p}", "time_embedding.0.{p}"),
    Spelling("time_embedding.2.{p}", "condition_embedder.time_embedder.linear_2.{p}", "time_embedding.2.{p}"),
    Spelling("time_projection.1.{p}", "condition_embedder.time_proj.{p}", "time_projection.1.{p}"),
    Spelling("head.head.{p}", "proj_out.{p}", "head.head.{p}"),
    Spelling("head.modulation", "scale_shift_table", "head.modulation"),
)
BRANCH = (
    Spelling("vace_patch_embedding.{p}", "vace_patch_embedding.{p}", "vace_patch_embedding.{p}"),
    Spelling("vace_blocks.0.before_proj.{p}", "vace_blocks.0.proj_in.{p}", "vace_blocks.0.before_proj.{p}"),
    Spelling(
        "vace_blocks.{i}.after_proj.{p}", "vace_blocks.{i}.proj_out.{p}", "vace_blocks.{i}.after_proj.{p}"
    ),
)
BLOCK = (  # in both blocks.i and vace_blocks.i
    Spelling("modulation", "scale_shift_table", "modulation"),
    Spelling("self_attn.{qkv}.{p}", "attn1.to_{qkv}.{p}", "self_attn.proj_{qkv}.{p}"),
    Spelling("self_attn.o.{p}", "attn1.to_out.0.{p}", "self_attn.proj_out.{p}"),
    Spelling("self_attn.norm_q.weight", "attn1.norm_q.weight", "self_attn.q_norm.weight"),
    Spelling("self_attn.norm_k.weight", "attn1.norm_k.weight", "self_attn.k_norm.weight"),
    Spelling("cross_attn.{qkv}.{p}", "attn2.to_{qkv}.{p}", "cross_attn.proj_{qkv}.{p}"),
    Spelling("cross_attn.o.{p}", "attn2.to_out.0.{p}", "cross_attn.proj_out.{p}"),
    Spelling("cross_attn.norm_q.weight", "attn2.norm_q.weight", "cross_attn.q_norm.weight"),
    Spelling("cross_attn.norm_k.weight", "attn2.norm_k.weight", "cross_attn.k_norm.weight"),
    Spelling("norm3.{p}", "norm2.{p}", "norm3.{p}"),
    Spelling("ffn.0.{p}", "ffn.net.0.proj.{p}", "ffn.0.{p}"),
    Spelling("ffn.2.{p}", "ffn.net.2.{p}", "ffn.2.{p}"),
)


def spellings() -> Iterator[Spelling]:
    """Yield every weight's full name in the three dialects. MM names start with `wan_dit.` or `vace_dit.`."""
    for row in TRUNK:
        yield row._replace(mm=f"wan_dit.{row.mm}")
    for row in BLOCK:
        yield Spelling(
            f"blocks.{{i}}.{row.official}", f"blocks.{{i}}.{row.diffusers}", f"wan_dit.blocks.{{i}}.{row.mm}"
        )
    for row in BRANCH:
        yield row._replace(mm=f"vace_dit.{row.mm}")
    for row in BLOCK:
        yield Spelling(
            f"vace_blocks.{{i}}.{row.official}",
            f"vace_blocks.{{i}}.{row.diffusers}",
            f"vace_dit.vace_blocks.{{i}}.wan_dit_block.{row.mm}",
        )


KEY_MAPS: Mapping[str, KeyMap] = {
    "official": KeyMap("official", [Rename(row.official, row.official) for row in spellings()]),
    "diffusers": KeyMap("diffusers", [Rename(row.official, row.diffusers) for row in spellings()]),
    "mm": KeyMap("mm", [Rename(row.official, row.mm) for row in spellings()]),
}
