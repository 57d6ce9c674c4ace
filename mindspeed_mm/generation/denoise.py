"""The denoising loop: predicts a velocity, takes the solver's step, checks for NaN, and calls the hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError, NonFiniteError
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.finite import explain_step
from mindspeed_mm.generation.guidance import GuidanceFn, guided_velocity
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.parity import rotated_noise
from mindspeed_mm.generation.result import PredictFn, Prediction, PromptEmbeds, Timings
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.solver import Solver
from mindspeed_mm.generation.windows.context import make_parts, of_windows
from mindspeed_mm.models.finite import is_finite
from mindspeed_mm.models.wan.config import VaceConfig


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


@torch.no_grad()
def denoise(
    models: ModelStore,
    vace_context: Tensor,
    prompts: Sequence[PromptEmbeds],
    sampling: SamplingConfig,
    *,
    num_refs: int = 0,
    noise: Tensor | None = None,
    guide: GuidanceFn = guided_velocity,
    hooks: Sequence[StepHook] = (),
) -> Tensor:
    """Denoise to latents [16, R+F, h, w], fp32 on the device, references first.

    `noise` [16, R+F, h, w] replaces the noise of the seed. `prompts` has one entry, or one for each context
    window. `num_refs` is used only for context windows and for `diffsynth_noise`.

    Raises NonFiniteError after the first step that produces NaN or infinite latents.
    """
    experts, device = models.experts, models.accelerator.device
    if problem := scale_problem(experts.config, sampling):
        raise problem
    if noise is None:
        noise = make_noise(vace_context.shape[1:], sampling.seed)
        noise = rotated_noise(noise, num_refs) if sampling.diffsynth_noise else noise
    context, batched = vace_context[None].to(device), [each.batched(device) for each in prompts]
    for each in batched:
        _check_inputs(context, each)
    if sampling.is_windowed:
        predict: PredictFn = of_windows(
            lambda index, part: Predictor(experts, part, batched[index], sampling, guide),
            context,
            make_parts(sampling, num_refs),
        )
    else:
        predict = Predictor(experts, context, batched[0], sampling, guide)
    hooks = (_finite_check(sampling), *hooks)
    try:
        return denoise_loop(predict, Solver(sampling), noise[None].to(device), hooks, models.timings)[0]
    finally:
        experts.offload()


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


def scale_problem(config: VaceConfig, sampling: SamplingConfig) -> ConfigError | None:
    """Return a ConfigError if `context_scale` does not match the number of branch blocks, else None."""
    scale, blocks = sampling.context_scale, len(config.vace_layers)
    if isinstance(scale, tuple) and len(scale) != blocks:
        expected = f"one, or one for each of {blocks} branch blocks"
        return ConfigError(f"got {len(scale)} numbers", where="context_scale", expected=expected)
    return None


def _check_inputs(vace_context: Tensor, prompts: PromptEmbeds) -> None:
    """Check the inputs before the first step.

    Raises NonFiniteError with the model whose output is not finite.
    """
    if not is_finite(vace_context):
        raise NonFiniteError(
            "the encoded inputs (vace_context) are not finite before denoising: the VAE overflows or is "
            "damaged",
            fix="set vae_dtype to fp32, or download the VAE again",
        )
    if not all(
        is_finite(rows)
        for rows in (prompts.prompt_embeds, prompts.negative_prompt_embeds)
        if rows is not None
    ):
        raise NonFiniteError(
            "the embedded prompt is not finite before denoising: the text encoder overflows or is damaged",
            fix="set dtype to fp32, or download the text encoder again",
        )


def _finite_check(sampling: SamplingConfig) -> StepHook:
    """Return a hook that raises NonFiniteError after the first step that produces NaN or infinite latents."""

    def check(step: Step) -> None:
        if not is_finite(step.latents):
            raise explain_step(sampling, step)

    return check
