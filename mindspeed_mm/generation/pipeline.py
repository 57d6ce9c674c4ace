"""VacePipeline: generates videos from a prompt, pixels and a mask.

Conditions are encoded by the same code as in feature extraction.

pipe = VacePipeline.from_pretrained("Wan2.1-VACE-1.3B")
result = pipe("a red ball bounces", src_video="depth.mp4", num_frames=81)
result.save("out/ball")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import parse
from mindspeed_mm.data.conditions import Conditions, to_tensors
from mindspeed_mm.data.images import Frames
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import Offload, RequestConfig, Tiled, WeightPaths
from mindspeed_mm.generation.denoise import StepHook
from mindspeed_mm.generation.loaders import (
    inspect_experts,
    load_experts,
    load_text_encoder,
    load_vae,
    resolve_model_dir,
)
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.outputs import describe, write_conditions, write_outcome
from mindspeed_mm.generation.request import Clip, GenerationRequest, Inputs, Picture
from mindspeed_mm.generation.result import GeneratedVideo
from mindspeed_mm.generation.run import generate
from mindspeed_mm.generation.sampling_config import Preset
from mindspeed_mm.generation.stages import explain_oom
from mindspeed_mm.generation.stored import write_latents
from mindspeed_mm.generation.usual import unusual_requests
from mindspeed_mm.generation.windows_config import WindowColors, WindowMode
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.ops.quantized import QuantFormat

LOGGER = get_logger(__name__)
OnStep = Callable[[int, int], None]  # number of completed steps, total number of steps


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A video with its latents, conditions and settings."""

    frames: Frames  # uint8 [T, H, W, 3]
    latents: Tensor | None  # [16, R+F, h, w] fp32 on the CPU, references first; None for window_mode extend
    num_refs: int
    conditions: Conditions  # the pixels that conditioned the model
    settings: dict[str, Any]  # every argument, seed, versions, seconds, memory

    def save(self, path: str | Path) -> Path:
        """Write PATH.mp4, PATH.png (contact sheet), PATH.json (settings), and PATH/ (conditions, latents)."""
        base = Path(path).with_suffix("") if Path(path).suffix == ".mp4" else Path(path)
        fps = float(self.settings["sampling"]["fps"])
        write_conditions(base, self.conditions, fps)
        if self.latents is not None:
            write_latents(base, self.latents, self.num_refs, self.settings)
        return write_outcome(
            base.parent,
            base.name,
            [self.frames],
            num_frames=len(self.frames),
            fps=fps,
            conditions=self.conditions,
            settings=lambda: self.settings,
        )


class VacePipeline:
    """Generates videos with a set of models.

    The stages are functions of `models`; see `generation.stages` and `generation.denoise`.
    """

    def __init__(self, models: ModelStore, config: VaceConfig | None = None) -> None:
        """Create a pipeline.

        `config` contains the sizes of the transformer. It is used to warn about requests that are far from
        what the weights were trained on.
        """
        self.models, self.config = models, config

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
        quantize: QuantFormat | None = None,
    ) -> VacePipeline:
        """Load a pipeline from a model folder (official or diffusers), an inference JSON, or separate paths.

        `device` is cpu, cuda or npu; None selects an available device. `quantize` is int8 or fp8, for the
        linear layers of the transformer's blocks.

        The transformer and the text encoder are loaded on first use. Raises WeightsError.
        """
        paths = weights if isinstance(weights, WeightPaths) else resolve_model_dir(weights)
        accelerator = Accelerator.detect(device)
        accelerator.hint_slow_bf16(dtype == torch.bfloat16, "pass dtype=torch.float32")
        config = inspect_experts(paths)
        models = ModelStore(
            lambda: load_experts(paths, dtype, accelerator, offload, quantize=quantize),
            load_vae(paths, vae_dtype, accelerator),
            lambda: load_text_encoder(paths, dtype, accelerator, config.trunk.text_len),
            accelerator=accelerator,
            tiled=tiled,
            num_experts=len(paths.experts),
        )
        return cls(models, config)

    def __call__(
        self,
        prompt: str | GenerationRequest,
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
        guidance_end: float | None = None,
        timesteps: Sequence[float] | None = None,
        loras: Sequence[LoraUse | Mapping[str, Any] | str] | None = None,
        context_scale: float | Sequence[float] | None = None,
        seed: int | None = None,
        solver: str | None = None,
        preset: Preset | None = None,
        short_clip: Literal["reject", "pad", "resample"] | None = None,
        long_clip: Literal["trim", "resample", "reject"] | None = None,
        fit: Literal["crop", "reject"] | None = None,
        timing: Literal["seconds", "frames"] | None = None,
        soft_mask: bool | None = None,
        window: int | None = None,
        window_mode: WindowMode | None = None,
        window_overlap: int | None = None,
        window_discard: int | None = None,
        window_colors: WindowColors | None = None,
        window_prompts: Sequence[str] | None = None,
        window_references: Sequence[Sequence[int]] | None = None,
        paste_back: int | None = None,
        diffsynth_noise: bool | None = None,
        diffsynth_references: bool | None = None,
        videoxfun_sigmas: bool | None = None,
        wan_frames: bool | None = None,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
        hooks: Sequence[StepHook] = (),
    ) -> GenerationResult:
        """Generate one video from a prompt and settings, or from a GenerationRequest, which contains both.

        Arguments have the same names as in the inference JSON. The preset supplies those that are None.
        Inputs may be paths, Pillow images, arrays or tensors (see `Inputs`). `hooks` are called after each
        denoising step.

        Raises ConfigError, DataError, NonFiniteError and WeightsError.
        """
        given = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "hooks") and value is not None
        }
        if on_step is not None:
            hooks = [lambda step: on_step(step.index + 1, step.total), *hooks]
        if isinstance(prompt, GenerationRequest):
            extra = (
                given.keys() - {"prompt", "on_step"} - ({"src_ref_images"} if src_ref_images == () else set())
            )
            if extra:
                problem = f"got a GenerationRequest and {', '.join(sorted(extra))}"
                raise ConfigError(problem, where="VacePipeline", fix="put everything into the request")
            return self.generate(prompt, hooks=hooks)
        if timesteps is not None:
            given["timesteps"] = tuple(timesteps)
        if loras is not None:
            given["loras"] = [
                use if isinstance(use, LoraUse) else dict(use) if isinstance(use, Mapping) else str(use)
                for use in loras
            ]
        if window_prompts is not None:
            given["window_prompts"] = tuple(window_prompts)
        if window_references is not None:
            given["window_references"] = tuple(map(tuple, window_references))
        if isinstance(context_scale, Sequence):
            given["context_scale"] = tuple(context_scale)
        values = {name: value for name, value in given.items() if name in RequestConfig.model_fields}
        settings = parse(RequestConfig, values, "VacePipeline")
        one = isinstance(src_ref_images, (str, Path, np.ndarray, Tensor, Image.Image))
        inputs = Inputs(
            src_video=src_video,
            src_mask=src_mask,
            src_ref_images=[src_ref_images] if one else src_ref_images,  # type: ignore[list-item, arg-type]
            first_frame=first_frame,
            last_frame=last_frame,
            outpaint=outpaint,
        )
        experts = self.models.num_experts
        request = GenerationRequest.resolve(settings, inputs, experts=experts, noise=noise)
        return self.generate(request, hooks=hooks)

    def generate(self, request: GenerationRequest, *, hooks: Sequence[StepHook] = ()) -> GenerationResult:
        """Generate the video of a fully specified request. `hooks` are called after each denoising step.

        Raises ConfigError, DataError, NonFiniteError and WeightsError.
        """
        if self.config is not None:
            for line in unusual_requests(self.config, {request.name or "video": request.sampling}):
                LOGGER.warning(line)
        result = generate(self.models, request, self._result, hooks=hooks)
        assert result is not None  # a single process is always the main process
        return result

    def _result(self, made: GeneratedVideo) -> GenerationResult:
        with explain_oom(made.request.name, "while decoding", "set tiled to always"):
            frames = np.concatenate(list(made.chunks()))
        return GenerationResult(
            frames=frames,
            latents=made.latents,
            num_refs=made.num_refs,
            conditions=to_tensors(made.conditions),
            settings=describe(self.models, made),
        )
