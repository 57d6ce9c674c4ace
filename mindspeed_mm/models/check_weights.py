"""Check that weights make up one complete model."""

from __future__ import annotations

import math

from megatron.mm.layout import parse_rank
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.foreign import foreign_trunk
from mindspeed_mm.models.source import WeightsSource, differences
from mindspeed_mm.models.wan.config_json import check_hints, setting_conflicts
from mindspeed_mm.models.wan.shapes import layout_of_shapes

_OF_THE_BRANCH = ("vace_layers", "vace_in_dim")  # a base may have other values, or none


def refuse_another_base(source: WeightsSource, whole: WeightsSource) -> None:
    """Raise WeightsError if a trainable-only checkpoint has other settings than `whole`, its base."""
    if whole.hints_from is None or source.hints_from is None:
        return
    mine = {name: value for name, value in source.hints.items() if name not in _OF_THE_BRANCH}
    if conflicts := setting_conflicts(mine, whole.hints):
        raise WeightsError(
            f"{source.hints_from} contradicts {whole.hints_from}, that of its base: {'; '.join(conflicts)}",
            where=source.path,
            fix="correct the wrong one",
        )


def check_weights(source: WeightsSource) -> None:
    """Check that all weights of the model are present, and no others. Raises WeightsError."""
    if source.has_branch and not any(name.startswith("blocks.") for name in source.tensors):
        raise WeightsError(
            "contains only a VACE module, without the trunk",
            where=source.path,
            fix=(
                "set the trunk's weights too: --cfg.base_path (mm-convert), predictor.from_pretrained "
                "next to predictor.vace_dit.vace_pretrained (training), or a list of both in "
                "model.transformer (generation)"
            ),
        )
    patch = source.shapes.get("patch_embedding.weight", ())
    head = source.shapes.get("head.head.weight", ())
    if (
        len(patch) == 5
        and len(head) == 2
        and (model := foreign_trunk(patch[1], head[0] // max(1, math.prod(patch[2:]))))
    ):
        raise WeightsError(
            f"got {model} (in_dim {patch[1]})",
            where=source.path,
            expected="a text-to-video or VACE transformer with in_dim 16",
            fix="use Wan2.1-T2V, Wan2.2-T2V or a VACE model",
        )
    try:
        problems = differences(source.shapes, layout_of_shapes(source.shapes))
    except WeightsError as error:
        problems = str(error)
    if problems:
        stage = parse_rank(source.path.parent.name)
        alone = "" if stage is None else f"; it is only pipeline stage {stage}"
        raise WeightsError(
            f"read as {source.dialect} names ({source.what}): {problems}{alone}",
            where=source.path,
            fix="" if stage is None else f"use {source.path.parent.parent}",
        )
    check_hints(source.shapes, source.hints, source.hints_from or source.path)
