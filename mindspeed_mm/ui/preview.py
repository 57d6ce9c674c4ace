"""Previews the inputs of the model before a run, with the code of `vace generate`.

Imports torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_mm.generation.request import GenerationRequest

if TYPE_CHECKING:
    from PIL import Image

_COLUMNS = 6


def draw_conditions(request: GenerationRequest) -> tuple[Image.Image | None, tuple[str, ...]]:
    """Draw a strip of the references, src_video and mask, and collect remarks.

    The strip is None if the request has only a prompt. Raises DataError.
    """
    from mindspeed_mm.data.sheet import draw_sheet, spread
    from mindspeed_mm.generation.conditions import read_conditions
    from mindspeed_mm.generation.outputs import condition_strips

    conditions = read_conditions(request)
    strips = condition_strips(conditions, spread(request.sampling.num_frames, _COLUMNS))
    if not strips:
        return None, conditions.notes
    sampling = request.sampling
    title = f"{sampling.width}x{sampling.height}, {sampling.num_frames} frames, {sampling.fps:g} fps"
    return draw_sheet(title, strips, caption=request.prompt, width=1280, columns=_COLUMNS), conditions.notes
