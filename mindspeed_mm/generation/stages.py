"""The stages before and after denoising, as functions of the models: prompts, conditions and decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mindspeed_mm.conditioning.text import encode_prompt
from mindspeed_mm.conditioning.vace import encode_vace_context
from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.data.images import Frames
from mindspeed_mm.data.video_writer import picture_frames
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.finite import explain_pixels
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.finite import is_finite

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


@contextmanager
def explain_oom(where: str, when: str = "before decoding", fix: str = _SMALLER) -> Iterator[None]:
    """Convert an out-of-memory error in the block to a DataError with advice.

    The original error becomes its cause.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DataError(f"out of memory {when}", where=where, fix=fix) from error
