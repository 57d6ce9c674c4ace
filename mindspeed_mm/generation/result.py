"""The data of a generation: prompt embeddings, timings, predicted velocities and the video."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.data.images import Frames
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.models.wan.vace import VaceTransformer


@dataclass(frozen=True, kw_only=True)
class PromptEmbeds:
    """The embedded prompts of one video."""

    prompt_embeds: Tensor  # [L, text_dim]
    negative_prompt_embeds: Tensor | None  # [L, text_dim]; None without guidance

    def batched(self, device: torch.device) -> PromptEmbeds:
        """Return the embeddings as [1, L, text_dim] on `device`."""
        negative = self.negative_prompt_embeds
        return PromptEmbeds(
            prompt_embeds=self.prompt_embeds[None].to(device),
            negative_prompt_embeds=None if negative is None else negative[None].to(device),
        )


class Timings:
    """The seconds of each phase, including work queued on the device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.seconds: dict[str, float] = {}
        self.steps: list[float] = []  # seconds of each denoising step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the run time of the block to the phase `name`."""
        self.accelerator.synchronize()
        start = time.perf_counter()
        yield
        self.accelerator.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time a denoising step, as part of the phase `denoise`."""
        before = self.seconds.get("denoise", 0.0)
        with self.phase("denoise"):
            yield
        self.steps.append(self.seconds["denoise"] - before)

    def report(self) -> dict[str, float]:
        """Return the rounded seconds of each phase. `step` is the median of the denoising steps."""
        report = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
        return {**report, "step": round(statistics.median(self.steps), 4)} if self.steps else report


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The velocity at one step, and how it was computed."""

    velocity: Tensor  # guided, [1, 16, R+F, h, w] fp32
    outputs: Sequence[Tensor]  # raw model outputs, one per forward pass
    model: VaceTransformer


PredictFn = Callable[[Tensor, Tensor], Prediction]  # latents, timestep [1]


@dataclass(frozen=True, kw_only=True)
class GeneratedVideo:
    """A generated video before it is decoded and written. Exists only on the main process."""

    request: GenerationRequest
    conditions: Conditions
    num_refs: int
    latents: Tensor | None  # [16, R+F, h, w], references first; None for a video with several latents
    chunks: Callable[[], Iterator[Frames]]  # the frames [t, H, W, 3], a few at a time
    report: Callable[[], dict[str, Any]]  # drift and seams of windows; to be called after the last frame
