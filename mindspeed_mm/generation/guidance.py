"""Classifier-free guidance.

Determines which prompts the model sees at a step, and how its velocities are combined.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

VelocityFn = Callable[[Tensor], Tensor]  # prompt_embeds [P, L, D] → velocity [P, 16, R+F, h, w]
GuidanceFn = Callable[[VelocityFn, Tensor, "Tensor | None", float], Tensor]


def guided_velocity(
    predict: VelocityFn, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, scale: float
) -> Tensor:
    """Return v_u + scale·(v_c − v_u) in fp32, [1, 16, R+F, h, w]. At scale 1, skips the negative prompt."""
    if scale == 1 or negative_prompt_embeds is None:
        return predict(prompt_embeds)
    conditional, unconditional = predict(pad_and_stack(prompt_embeds, negative_prompt_embeds)).chunk(2)
    return apply_cfg(conditional, unconditional, scale)


def pad_and_stack(prompt_embeds: Tensor, negative_prompt_embeds: Tensor) -> Tensor:
    """Stack both [1, L, D] to [2, max L, D] with zero padding, which the model itself adds to prompts."""
    both = (prompt_embeds, negative_prompt_embeds)
    longest = max(rows.shape[1] for rows in both)
    return torch.cat([F.pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows in both])


def apply_cfg(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Combine the velocities of the prompt and the negative prompt into the guided velocity."""
    return unconditional + scale * (conditional - unconditional)
