"""The stages of a generation as functions of the models: prompts, conditions, denoising and decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mindspeed_mm.conditioning.text import encode_prompt
from mindspeed_mm.conditioning.vace import encode_vace_context
from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.generation.denoise import PredictFn, Predictor, StepHook, denoise_loop
from mindspeed_mm.generation.finite import check_inputs, explain_pixels, finite_check
from mindspeed_mm.generation.guidance import GuidanceFn, guided_velocity
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.noise import make_noise
from mindspeed_mm.generation.parity import rotated_noise
from mindspeed_mm.generation.result import PromptEmbeds
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.solver import Solver
from mindspeed_mm.generation.windows.context import make_parts, of_windows
from mindspeed_mm.generation.writer import Frames, picture_frames
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.finite import is_finite
from mindspeed_mm.models.wan.config import VaceConfig

_SMALLER = (
    "set offload to model or block, let more processes share a video (shard_weights), "
    "or choose a smaller size or fewer frames"
)


def encode_prompts(models: ModelStore, prompts: Iterable[str]) -> dict[str, Tensor]:
    """Return the embedding [L, text_dim] of each prompt, on the host.

    Encodes and caches new prompts, and then frees the text encoder.
    """
    prompts = list(dict.fromkeys(prompts))
    new = [prompt for prompt in prompts if prompt not in models.cached_prompts]
    if new:
        with models.timings.phase("text"):
            rows = encode_prompt(models.text_encoder, new)
            models.cached_prompts.update(zip(new, (each.cpu() for each in rows), strict=True))
        models.free_text_encoder()
    return {prompt: models.cached_prompts[prompt] for prompt in prompts}


@torch.no_grad()
def encode_conditions(models: ModelStore, conditions: Conditions, sampling: SamplingConfig) -> Tensor:
    """Encode conditions to vace_context [96, R+F, h, w]. Uses the same code as feature extraction."""
    encoder = models.stream_encoder(sampling.height, sampling.width)
    with models.timings.phase("vae_encode"):
        return encode_vace_context(
            encoder,
            conditions.src_video,
            conditions.src_mask,
            conditions.src_ref_images,
            num_frames=sampling.num_frames,
            height=sampling.height,
            width=sampling.width,
        )


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
        check_inputs(context, each)
    if sampling.is_windowed:
        predict: PredictFn = of_windows(
            lambda index, part: Predictor(experts, part, batched[index], sampling, guide),
            context,
            make_parts(sampling, num_refs),
        )
    else:
        predict = Predictor(experts, context, batched[0], sampling, guide)
    hooks = (finite_check(sampling), *hooks)
    try:
        return denoise_loop(predict, Solver(sampling), noise[None].to(device), hooks, models.timings)[0]
    finally:
        experts.offload()


@torch.no_grad()
def decode(models: ModelStore, latents: Tensor, num_refs: int = 0) -> Iterator[Frames]:
    """Decode latents [16, R+F, h, w] to frames [t, H, W, 3], a few at a time, without the references.

    Raises NonFiniteError instead of yielding frames that are not finite.
    """
    _, rows, columns = WAN.stride
    vae = models.vae_for(latents.shape[-2] * rows, latents.shape[-1] * columns)
    chunks = vae.decode_frames(latents[:, num_refs:].to(models.accelerator.device))
    done = 0
    while True:
        with models.timings.phase("vae_decode"):
            chunk = next(chunks, None)
            if chunk is not None and not is_finite(chunk):
                raise explain_pixels(done, vae.model, latents)
            frames = None if chunk is None else picture_frames(chunk)
        if frames is None:
            return
        done += len(frames)
        yield frames


def scale_problem(config: VaceConfig, sampling: SamplingConfig) -> ConfigError | None:
    """Return a ConfigError if `context_scale` does not match the number of branch blocks, else None."""
    scale, blocks = sampling.context_scale, len(config.vace_layers)
    if isinstance(scale, tuple) and len(scale) != blocks:
        expected = f"one, or one for each of {blocks} branch blocks"
        return ConfigError(f"got {len(scale)} numbers", where="context_scale", expected=expected)
    return None


@contextmanager
def explain_oom(where: str, when: str = "before decoding", fix: str = _SMALLER) -> Iterator[None]:
    """Convert an out-of-memory error in the block to a DataError with advice.

    The original error becomes its cause.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DataError(f"out of memory {when}", where=where, fix=fix) from error
