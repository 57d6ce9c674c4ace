"""VacePipeline: words, pixels and a mask → a video. Conditioning is the same code as in feature extraction.

pipe = VacePipeline.from_pretrained("Wan2.1-VACE-1.3B")
result = pipe("a red ball bounces", src_video="depth.mp4", num_frames=81)
result.save("out/ball")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.conditioning.streams import StreamEncoder
from mindspeed_mm.conditioning.text import encode_prompt
from mindspeed_mm.conditioning.vace import encode_vace_context
from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.generation.config import (
    NEGATIVE_PROMPT,
    Offload,
    Preset,
    RequestConfig,
    SamplingConfig,
    Tiled,
    WeightPaths,
    decide,
)
from mindspeed_mm.generation.config import Solver as SolverName
from mindspeed_mm.generation.denoise import Predictor, StepHook, denoise_loop
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.finite import check_inputs, explain_pixels, finite_check
from mindspeed_mm.generation.guidance import GuidanceFn, guided_velocity
from mindspeed_mm.generation.inputs import Clip, Conditions, Inputs, Picture, load_conditions
from mindspeed_mm.generation.parity import rotated_noise
from mindspeed_mm.generation.parts import (
    find_parts,
    inspect_experts,
    load_experts,
    load_image_coder,
    load_text,
)
from mindspeed_mm.generation.result import Frames, GenerationResult, PromptEmbeds, Timings, to_bytes
from mindspeed_mm.generation.solvers import Solver, make_noise
from mindspeed_mm.generation.writer import versions
from mindspeed_mm.models.finite import is_finite
from mindspeed_mm.models.umt5.encoder import TextEncoder
from mindspeed_mm.models.wan.vae import WanVae

OnStep = Callable[[int, int], None]  # steps done, steps in all


class VacePipeline:
    """Models, and what one does with them. Every method may be called alone."""

    def __init__(
        self,
        experts: Experts | Callable[[], Experts] | None,
        vae: WanVae | None,
        text_encoder: TextEncoder | Callable[[], TextEncoder] | None,
        *,
        accelerator: Accelerator,
        tiled: Tiled = "auto",
        guide: GuidanceFn = guided_velocity,
        num_experts: int | None = None,
    ) -> None:
        """`experts` and `text_encoder` may be functions that load them when they are first needed.

        `num_experts`: how many `experts` will load; it decides the presets' shift (default: what is there, or 1).
        """
        self.num_experts = num_experts or (len(experts.models) if isinstance(experts, Experts) else 1)
        self._experts = experts
        self._vae = None if vae is None else vae.to(accelerator.device)
        self._encoder: StreamEncoder | None = (
            None  # remembers the latents of grey, which is most of what VACE encodes
        )
        self._text_encoder = text_encoder
        self._loaded_text: TextEncoder | None = (
            text_encoder if isinstance(text_encoder, TextEncoder) else None
        )
        self._embeds: dict[str, Tensor] = {}
        self.accelerator = accelerator
        self.tiled: Tiled = tiled
        self.guide = guide
        self.timings = Timings(accelerator)

    @classmethod
    def from_pretrained(
        cls,
        weights: str | Path | WeightPaths,
        *,
        dtype: torch.dtype = torch.bfloat16,
        vae_dtype: torch.dtype = torch.float32,
        device: str | None = None,
        offload: Offload = "none",
        tiled: Tiled = "auto",
    ) -> VacePipeline:
        """From a model folder (official or diffusers), or from parts. `device`: cpu, cuda or npu; None = what is there.

        The transformer and the text encoder are read when they are first needed. Raises WeightsError.
        """
        paths = weights if isinstance(weights, WeightPaths) else find_parts(weights)
        accelerator = Accelerator.detect(device)
        text_len = inspect_experts(paths).trunk.text_len
        return cls(
            lambda: load_experts(paths, dtype, accelerator, offload),
            load_image_coder(paths, vae_dtype, accelerator),
            lambda: load_text(paths, dtype, accelerator, text_len),
            accelerator=accelerator,
            tiled=tiled,
            num_experts=len(paths.experts),
        )

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        src_video: Clip | None = None,
        src_mask: Clip | None = None,
        src_ref_images: Picture | Sequence[Picture] = (),
        first_frame: Clip | None = None,
        last_frame: Clip | None = None,
        outpaint: tuple[float, float, float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        shift: float | None = None,
        boundary: float | None = None,
        context_scale: float | Sequence[float] | None = None,
        seed: int | None = None,
        solver: SolverName | None = None,
        preset: Preset | None = None,
        short_clip: Literal["reject", "pad", "resample"] | None = None,
        long_clip: Literal["trim", "resample", "reject"] | None = None,
        fit: Literal["crop", "reject"] | None = None,
        timing: Literal["seconds", "frames"] | None = None,
        soft_mask: bool | None = None,
        diffsynth_noise: bool | None = None,
        diffsynth_references: bool | None = None,
        videoxfun_sigmas: bool | None = None,
        wan_frames: bool | None = None,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> GenerationResult:
        """One video. What is None comes from the preset; the names are those of the inference JSON.

        Inputs may be paths, Pillow images, arrays or tensors (see `Inputs`). Raises ConfigError, DataError, WeightsError.
        """
        request = parse(
            RequestConfig,
            {
                "height": height,
                "width": width,
                "num_frames": num_frames,
                "fps": fps,
                "steps": steps,
                "guidance_scale": guidance_scale,
                "guidance_scale_2": guidance_scale_2,
                "shift": shift,
                "boundary": boundary,
                "context_scale": tuple(context_scale)
                if isinstance(context_scale, Sequence)
                else context_scale,
                "seed": seed,
                "solver": solver,
                "preset": preset,
                "short_clip": short_clip,
                "long_clip": long_clip,
                "fit": fit,
                "timing": timing,
                "soft_mask": soft_mask,
                "diffsynth_noise": diffsynth_noise,
                "diffsynth_references": diffsynth_references,
                "videoxfun_sigmas": videoxfun_sigmas,
                "wan_frames": wan_frames,
                "outpaint": outpaint,
            },
            "VacePipeline",
        )
        one = isinstance(src_ref_images, (str, Path, np.ndarray, Tensor, Image.Image))
        inputs = Inputs(
            src_video=src_video,
            src_mask=src_mask,
            src_ref_images=[src_ref_images] if one else src_ref_images,  # type: ignore[list-item, arg-type]
            first_frame=first_frame,
            last_frame=last_frame,
            outpaint=outpaint,
        )
        sampling = decide(request, experts=self.num_experts)
        negative = NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
        hooks = [] if on_step is None else [lambda step: on_step(step.index + 1, step.total)]
        return self.generate(prompt, negative, inputs, sampling, noise=noise, hooks=hooks)

    def generate(
        self,
        prompt: str,
        negative_prompt: str,
        inputs: Inputs,
        sampling: SamplingConfig,
        *,
        noise: Tensor | None = None,
        hooks: Sequence[StepHook] = (),
    ) -> GenerationResult:
        """`__call__` with every number decided."""
        self.start_measuring()
        conditions = load_conditions(inputs, sampling)
        texts = self.texts(prompt, negative_prompt, sampling)
        self.free_text_encoder()
        num_refs, context = len(conditions.src_ref_images), self.encode(conditions, sampling)
        latents = self.denoise(context, texts, sampling, num_refs=num_refs, noise=noise, hooks=hooks).cpu()
        return GenerationResult(
            frames=np.concatenate(list(self.decode(latents, num_refs))),
            latents=latents,
            num_refs=num_refs,
            conditions=conditions,
            settings=self.describe(prompt, negative_prompt, conditions, sampling),
        )

    def describe(
        self, prompt: str, negative_prompt: str, conditions: Conditions | None, sampling: SamplingConfig
    ) -> dict[str, Any]:
        """Everything that makes this video again, and what it cost; plain values."""
        return {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "sampling": sampling.model_dump(mode="json"),
            "notes": [] if conditions is None else list(conditions.notes),
            "num_refs": 0 if conditions is None else len(conditions.src_ref_images),
            "tiled": self._vae is not None and self._vae.tiled,
            "device": self.accelerator.device_name(),
            "seconds": self.timings.report(),
            "peak_memory_gb": round(self.accelerator.max_memory_allocated() / 1e9, 3),
            "versions": versions(),
        }

    @property
    def experts(self) -> Experts:
        """The transformers; loaded now if they were not."""
        return self.load_experts()

    def load_experts(self) -> Experts:
        """Read the transformers, if they were not. Raises WeightsError."""
        if self._experts is None:
            raise WeightsError("this pipeline has no transformer; it can only decode")
        if not isinstance(self._experts, Experts):
            with self.timings.phase("load"):
                self._experts = self._experts()
        return self._experts

    @property
    def vae(self) -> WanVae:
        """The VAE. Raises WeightsError on a process that has none."""
        if self._vae is None:
            raise WeightsError("this pipeline has no VAE; it can only denoise")
        return self._vae

    def start_measuring(self) -> None:
        """Seconds and peak memory from here on."""
        self.timings = Timings(self.accelerator)
        self.accelerator.reset_peak_memory()

    def texts(self, prompt: str, negative_prompt: str, sampling: SamplingConfig) -> PromptEmbeds:
        """Embeddings of what guidance will ask about; known prompts need no text encoder."""
        asked = [prompt, negative_prompt] if sampling.needs_guidance else [prompt]
        self.embed(asked)
        known = [self._embeds[text] for text in asked]
        return PromptEmbeds(
            prompt_embeds=known[0], negative_prompt_embeds=known[1] if sampling.needs_guidance else None
        )

    def embed(self, prompts: Sequence[str]) -> None:
        """Encode those prompts that are not known yet; the embeddings are remembered on the host."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeds]
        if not new:
            return
        with self.timings.phase("text"):
            encoder = self._text()
            self._embeds.update(zip(new, (rows.cpu() for rows in encode_prompt(encoder, new)), strict=True))

    def remember(self, embeds: dict[str, Tensor]) -> None:
        """Take prompts' embeddings [L, text_dim] as known."""
        self._embeds.update(embeds)

    def known(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The remembered embeddings of `prompts`."""
        return {prompt: self._embeds[prompt] for prompt in prompts}

    def free_text_encoder(self) -> None:
        """Drop the text encoder, which is the largest model after the transformer; it is loaded again when needed."""
        if self._loaded_text is not None and not callable(self._text_encoder):
            self._loaded_text.to("cpu")
        else:
            self._loaded_text = None
        self.accelerator.empty_cache()

    def _text(self) -> TextEncoder:
        if self._loaded_text is None:
            if self._text_encoder is None or isinstance(self._text_encoder, TextEncoder):
                raise WeightsError(
                    "this pipeline has no text encoder and does not know the prompt's embedding"
                )
            self._loaded_text = self._text_encoder()
        return self._loaded_text.to(self.accelerator.device)

    @torch.no_grad()
    def encode(self, conditions: Conditions, sampling: SamplingConfig) -> Tensor:
        """vace_context [96, R+F, h, w] of what the model is shown."""
        self._set_tiling(sampling.height, sampling.width)
        if self._encoder is None:
            self._encoder = StreamEncoder(self.vae)
        with self.timings.phase("vae_encode"):
            return encode_vace_context(
                self._encoder,
                conditions.src_video,
                conditions.src_mask,
                conditions.src_ref_images,
                num_frames=sampling.num_frames,
                height=sampling.height,
                width=sampling.width,
            )

    @torch.no_grad()
    def denoise(
        self,
        vace_context: Tensor,
        texts: PromptEmbeds,
        sampling: SamplingConfig,
        *,
        num_refs: int = 0,
        noise: Tensor | None = None,
        hooks: Sequence[StepHook] = (),
    ) -> Tensor:
        """Latents [16, R+F, h, w] fp32 on the device, references first. `noise` [16, R+F, h, w] replaces the seed's.

        `num_refs` matters to `diffsynth_noise` alone. Raises NonFiniteError after the first step that leaves a latent NaN or infinite.
        """
        experts, device = self.experts, self.accelerator.device
        self._check_scale(sampling)
        solver = Solver(sampling)
        context, batched = vace_context[None].to(device), texts.batched(device)
        if noise is None:
            noise = make_noise(vace_context.shape[1:], sampling.seed)
            noise = rotated_noise(noise, num_refs) if sampling.diffsynth_noise else noise
        check_inputs(context, batched)
        predict = Predictor(experts, context, batched, sampling, self.guide)
        try:
            hooks = (finite_check(sampling), *hooks)
            return denoise_loop(predict, solver, noise[None].to(device), hooks, self.timings)[0]
        finally:
            experts.leave()

    @torch.no_grad()
    def decode(self, latents: Tensor, num_refs: int = 0) -> Iterator[Frames]:
        """Latents [16, R+F, h, w] → frames [t, H, W, 3], a few at a time; the references are left out.

        Raises NonFiniteError before it gives out a frame that is not finite.
        """
        self._set_tiling(latents.shape[-2] * 8, latents.shape[-1] * 8)
        chunks = iter(self.vae.decode_frames(latents[:, num_refs:].to(self.accelerator.device)))
        done = 0
        while True:
            with self.timings.phase("vae_decode"):
                chunk = next(chunks, None)
                if chunk is not None and not is_finite(chunk):
                    raise explain_pixels(done, self.vae.model, latents)
                frames = None if chunk is None else to_bytes(chunk)
            if frames is None:
                return
            done += len(frames)
            yield frames

    def _check_scale(self, sampling: SamplingConfig) -> None:
        blocks = len(self.experts.config.vace_layers)
        scale = sampling.context_scale
        if isinstance(scale, tuple) and len(scale) != blocks:
            raise ConfigError(
                f"context_scale has {len(scale)} numbers; give one, or one for each of {blocks} branch blocks"
            )

    def _set_tiling(self, height: int, width: int) -> None:
        tiles = self.tiled == "always" or (self.tiled == "auto" and self.needs_tiles(height, width))
        if tiles == self.vae.tiled:
            return
        self._encoder = None  # what it remembers was computed the other way
        if tiles:
            self.vae.enable_tiling()
        else:
            self.vae.disable_tiling()

    def needs_tiles(self, height: int, width: int) -> bool:
        """Whether whole frames would take more memory than the device has left."""
        free = self.accelerator.total_memory() - self.accelerator.memory_allocated()
        return vae_bytes(self.vae, height, width) > 0.8 * free


def vae_bytes(vae: WanVae, height: int, width: int) -> int:
    """Peak bytes of activations when whole frames of this size are decoded; an estimate that grows with the frame's area only."""
    width_of_layers = int(vae.model.config.base_dim)
    return int(_VAE_PLANES * width_of_layers * height * width * vae.model.dtype.itemsize)


_VAE_PLANES = 90  # base_dim feature maps of the output's size that are alive at once: 88 measured on a CPU, fp32, 192x256
