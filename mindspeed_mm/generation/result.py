"""What goes through a generation and what comes out of it: embedded prompts, seconds, the video with its settings."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mindspeed_mm.generation.inputs import Conditions
from mindspeed_mm.generation.writer import write_conditions, write_latents, write_outcome

Frames = NDArray[np.uint8]  # [T, H, W, 3]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Embedded prompts of one video."""

    prompt_embeds: Tensor  # [L, text_dim]
    negative_prompt_embeds: Tensor | None  # [L, text_dim]; None when guidance does not ask


@dataclass
class Timings:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    def add(self, phase: str, seconds: float) -> None:
        """Add to what the phase has taken."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def report(self) -> dict[str, float]:
        """Plain numbers; `step` is the median of the denoising steps."""
        report = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
        return {**report, "step": round(statistics.median(self.steps), 4)} if self.steps else report


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A video and all that is known of it."""

    frames: Frames  # uint8 [T, H, W, 3]
    latents: Tensor  # [16, R+F, h, w] fp32 on the CPU, references first
    num_refs: int
    conditions: Conditions  # what the model was shown
    settings: dict[str, Any]  # every argument, seed, versions, seconds, memory

    def save(self, path: str | Path) -> Path:
        """PATH.mp4, PATH.png (contact sheet), PATH.json (settings), and PATH/ with conditions and latents."""
        base = Path(path).with_suffix("") if Path(path).suffix == ".mp4" else Path(path)
        fps = float(self.settings["sampling"]["fps"])
        write_conditions(base, self.conditions, fps)
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


def to_bytes(pixels: Tensor) -> Frames:
    """[3, t, H, W] in [-1, 1] → uint8 [t, H, W, 3], rounded."""
    frames = ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).byte()
    return frames.permute(1, 2, 3, 0).contiguous().cpu().numpy()
