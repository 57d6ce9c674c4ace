"""Explains why latents or pixels are NaN or infinite, with the likely cause and a fix.

This code runs only after a check in `denoise` or `stages.decode` has failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mindspeed_mm.errors import NonFiniteError
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.models.finite import is_finite, nonfinite_weights

if TYPE_CHECKING:
    from mindspeed_mm.generation.denoise import Step

# Bounds that all published settings are well within.
_CUSTOMARY = {
    "guidance_scale": (0.0, 50.0),
    "guidance_scale_2": (0.0, 50.0),
    "context_scale": (-10.0, 10.0),
    "shift": (0.01, 1000.0),
}
_TALL = 1e3  # latents are of order 1, so if a step starts above this value, an earlier step is the cause


def explain_step(sampling: SamplingConfig, step: Step) -> NonFiniteError:
    """Return an error that explains why the latents after `step` are not finite."""
    cause, fix = _cause(sampling, step)
    return NonFiniteError(
        f"latents are not finite, and no video was written: {cause}",
        where=f"denoising step {step.index + 1} of {step.total} (timestep {step.timestep:g})",
        fix=fix,
    )


def explain_pixels(frame: int, vae: nn.Module, latents: Tensor) -> NonFiniteError:
    """Return an error that explains why the frames from `frame` (counted from 0) on are NaN or infinite."""
    bad = nonfinite_weights(vae)
    if not is_finite(latents):
        cause, fix = "the latents are not finite", "generate them again"
    elif bad:
        cause, fix = f"the VAE's weights contain NaN or Inf ({bad})", "download the VAE again"
    elif float(latents.abs().max()) > _TALL:
        cause = f"the latents reach {float(latents.abs().max()):.3g}, where about 1 is usual"
        fix = "lower guidance_scale or shift"
    else:
        cause, fix = "the VAE overflows", "set vae_dtype to fp32"
    return NonFiniteError(
        f"decoded pixels are not finite, and no video was written: {cause}",
        where=f"from frame {frame} on",
        fix=fix,
    )


def _cause(sampling: SamplingConfig, step: Step) -> tuple[str, str]:
    """Return the likely cause and a fix."""
    model, tallest = step.prediction.model, float(step.before.abs().max())
    bad = nonfinite_weights(model)
    if bad:
        cause = f"the transformer's weights contain NaN or Inf ({bad})"
        return cause, "load an earlier checkpoint or download them again"
    if extreme := _extreme(sampling):
        return f"{' and '.join(extreme)}: likely too far from usual values", "use a value near the preset's"
    if is_finite(step.prediction.velocity):
        cause = f"shift {sampling.shift:g} leaves solver {sampling.solver} no usable sigmas"
        return cause, "use a shift near the preset's"
    if all(is_finite(output) for output in step.prediction.outputs):
        return f"guidance_scale {sampling.guidance_scale:g} overflows the guided velocity", "lower it"
    if tallest > _TALL:
        return (
            f"earlier steps grew the latents to {tallest:.3g}, where about 1 is usual",
            f"lower guidance_scale {sampling.guidance_scale:g} or shift {sampling.shift:g}",
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return (
        f"the transformer itself returns NaN or Inf in {dtype}",
        "set dtype to fp32, or lower context_scale",
    )


def _extreme(sampling: SamplingConfig) -> list[str]:
    found = []
    for name, (low, high) in _CUSTOMARY.items():
        if name == "guidance_scale_2" and sampling.guidance_scale_2 == sampling.guidance_scale:
            continue
        value = getattr(sampling, name)
        values = value if isinstance(value, tuple) else (value,)
        found += [f"{name} {number:g}" for number in values if not low <= number <= high][:1]
    return found
