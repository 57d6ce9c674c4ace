"""The data of a generation: prompt embeddings, timings, and the video with its settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.stored import write_latents
from mindspeed_mm.generation.writer import Frames, write_conditions, write_outcome


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
class GeneratedVideo:
    """A generated video before it is decoded and written. Exists only on the main process."""

    request: GenerationRequest
    conditions: Conditions
    num_refs: int
    latents: Tensor | None  # [16, R+F, h, w], references first; None for a video with several latents
    chunks: Callable[[], Iterator[Frames]]  # the frames [t, H, W, 3], a few at a time
    report: Callable[[], dict[str, Any]]  # drift and seams of windows; to be called after the last frame


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
