"""Classifier-free guidance: which questions the model is asked at a step, and how the answers are joined."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Ask = Callable[[Tensor], Tensor]  # prompt_embeds [1, L, D] → velocity [1, 16, R+F, h, w]
Guide = Callable[[Ask, Tensor, "Tensor | None", float], Tensor]


def guided_velocity(ask: Ask, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, scale: float) -> Tensor:
    """v_u + scale·(v_c − v_u) in fp32. At scale 1 the negative prompt is not asked about."""
    conditional = ask(prompt_embeds)
    if scale == 1 or negative_prompt_embeds is None:
        return conditional
    return joined(conditional, ask(negative_prompt_embeds), scale)


def joined(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Both answers → the guided one."""
    return unconditional + scale * (conditional - unconditional)
