"""The denoising loop: predicts a velocity, takes the solver's step, and calls the hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.guidance import GuidanceFn
from mindspeed_mm.generation.result import PromptEmbeds, Timings
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.solver import Solver
from mindspeed_mm.models.wan.vace import VaceTransformer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The velocity at one step, and how it was computed."""

    velocity: Tensor  # guided, [1, 16, R+F, h, w] fp32
    outputs: Sequence[Tensor]  # raw model outputs, one per forward pass
    model: VaceTransformer


@dataclass(frozen=True, kw_only=True)
class Step:
    """A completed denoising step."""

    index: int  # from 0
    total: int
    timestep: float
    before: Tensor  # latents [1, 16, R+F, h, w]
    latents: Tensor  # latents after the step
    prediction: Prediction


StepHook = Callable[[Step], None]  # for progress, previews, cancelling; an exception in a hook ends the video
PredictFn = Callable[[Tensor, Tensor], Prediction]  # latents, timestep [1]


def denoise_loop(
    predict: PredictFn, solver: Solver, latents: Tensor, hooks: Sequence[StepHook], timings: Timings
) -> Tensor:
    """Denoise noise [1, 16, R+F, h, w] to latents.

    All hooks are called after each step, in order; their time is not measured.
    """
    for index, timestep in enumerate(solver.timesteps):
        with timings.step():
            prediction = predict(latents, solver.timesteps[index : index + 1])
            after = solver.step(prediction.velocity, index, latents)
        step = Step(
            index=index,
            total=len(solver),
            timestep=float(timestep),
            before=latents,
            latents=after,
            prediction=prediction,
        )
        for hook in hooks:
            hook(step)
        latents = after
    return latents


class Predictor:
    """Predicts the guided velocity of one video.

    Selects the expert for each timestep, and runs both prompts through it.
    """

    def __init__(
        self,
        experts: Experts,
        vace_context: Tensor,
        prompts: PromptEmbeds,
        sampling: SamplingConfig,
        guide: GuidanceFn,
    ) -> None:
        """`vace_context` [1, 96, R+F, h, w] and the prompts [1, L, text_dim] are on the device."""
        self.experts, self.vace_context, self.prompts = experts, vace_context, prompts
        self.sampling, self.guide = sampling, guide
        self.needs_branch = has_weight(sampling.context_scale) and bool(experts.config.vace_layers)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Prediction:
        """Predict the velocity of latents [1, 16, R+F, h, w] at `timestep` [1]."""
        model, scale = self.experts.at(float(timestep), self.sampling)
        tokens = latents[0, 0].numel() // math.prod(model.config.trunk.patch_size)
        is_batched = self.experts.fits_batched_cfg(tokens)
        context = self.vace_context if self.needs_branch else None
        timestep = timestep.to(latents.device)
        outputs: list[Tensor] = []

        def predict(prompt_embeds: Tensor) -> Tensor:
            chunks = torch.split(prompt_embeds, len(prompt_embeds) if is_batched else 1)
            context_scale = self.sampling.context_scale
            outputs.extend(
                model(latents, timestep, chunk, context, context_scale=context_scale) for chunk in chunks
            )
            return torch.cat(outputs)

        velocity = self.guide(predict, self.prompts.prompt_embeds, self.prompts.negative_prompt_embeds, scale)
        return Prediction(velocity=velocity, outputs=outputs, model=model)


def has_weight(scale: float | Sequence[float]) -> bool:
    """Return whether the VACE branch contributes at all with this `context_scale`."""
    return any(scale) if isinstance(scale, Sequence) else scale != 0
