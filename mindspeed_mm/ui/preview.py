"""What the model is shown, before anything runs: the pixels of `vace generate`, by its own code.

Imports torch when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_mm.generation.request import GenerationRequest

if TYPE_CHECKING:
    from PIL import Image

_COLUMNS = 6


def draw_conditions(request: GenerationRequest) -> tuple[Image.Image | None, tuple[str, ...]]:
    """A strip of references, src_video and mask, and remarks; None when the prompt is all.

    Raises DataError.
    """
    from mindspeed_mm.data.sheet import draw_sheet, spread
    from mindspeed_mm.generation.conditions import read_conditions
    from mindspeed_mm.generation.writer import condition_strips

    conditions = read_conditions(request)
    strips = condition_strips(conditions, spread(request.sampling.num_frames, _COLUMNS))
    if not strips:
        return None, conditions.notes
    sampling = request.sampling
    title = f"{sampling.width}x{sampling.height}, {sampling.num_frames} frames, {sampling.fps:g} fps"
    return draw_sheet(title, strips, caption=request.prompt, width=1280, columns=_COLUMNS), conditions.notes
