"""Classifier-free guidance: which questions the model is asked at a step, and how the answers are joined."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Ask = Callable[[Tensor], Tensor]  # prompt_embeds [P, L, D] → velocity [P, 16, R+F, h, w]
Guide = Callable[[Ask, Tensor, "Tensor | None", float], Tensor]


def guided_velocity(ask: Ask, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, scale: float) -> Tensor:
    """v_u + scale·(v_c − v_u) in fp32, [1, 16, R+F, h, w]. At scale 1 the negative prompt is not asked about."""
    if scale == 1 or negative_prompt_embeds is None:
        return ask(prompt_embeds)
    conditional, unconditional = ask(stacked(prompt_embeds, negative_prompt_embeds)).chunk(2)
    return joined(conditional, unconditional, scale)


def stacked(prompt_embeds: Tensor, negative_prompt_embeds: Tensor) -> Tensor:
    """Both [1, L, D] → [2, max L, D]. Zero rows are what the model itself fills a prompt up with."""
    both = (prompt_embeds, negative_prompt_embeds)
    longest = max(rows.shape[1] for rows in both)
    return torch.cat([F.pad(rows, (0, 0, 0, longest - rows.shape[1])) for rows in both])


def joined(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Both answers → the guided one."""
    return unconditional + scale * (conditional - unconditional)
