"""The sampling settings of one video: size, frames, solver, guidance. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.generation.solvers.config import SolverName
from mindspeed_mm.generation.windows_config import WindowKeys
from mindspeed_mm.geometry import WAN

Preset = Literal[
    "wan",
    "diffsynth",
    "diffusers",
    "mindspeed",
    "lightx2v-4step",
    "lightx2v-8step",
    "causvid",
    "fusionix",
    "self-forcing",
    "vace-3phase",
]


class Numbers(WindowKeys):
    """The numbers of one video and their bounds."""

    height: int = Field(
        default=480, gt=0, le=16384, description="height in pixels, a multiple of 16 (default: 480)"
    )
    width: int = Field(
        default=832, gt=0, le=16384, description="width in pixels, a multiple of 16 (default: 832)"
    )
    short_clip: Literal["reject", "pad", "resample"] = Field(
        default="reject",
        description="what to do with a source that has fewer frames than num_frames (default: reject)",
    )
    preset: Preset = Field(
        default="wan",
        description=(
            "project or LoRA whose sampler settings are used; mindspeed also selects MindSpeed-MM's "
            "three videos; presets from lightx2v-4step on are for few-step LoRAs (default: wan)"
        ),
    )
    solver: SolverName = Field(default="unipc", description="sampler (default: by preset)")
    steps: int = Field(default=50, gt=0, le=1000, description="number of denoising steps (default: 50)")
    shift: float = Field(
        default=16.0,
        ge=0.001,
        le=1000,
        description="shift of the sigmas towards high noise (default: by preset)",
    )
    timesteps: tuple[float, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description=(
            "timestep of each step, decreasing from at most 1000, instead of steps and shift; "
            "needs solver euler or renoise"
        ),
    )
    guidance_scale: float = Field(
        default=5.0, ge=0, le=1000, description="guidance scale; 1 = no negative prompt (default: 5)"
    )
    guidance_scale_2: float = Field(
        default=5.0,
        ge=0,
        le=1000,
        description="guidance scale of the low-noise expert (default: guidance_scale)",
    )
    guidance_end: float = Field(
        default=0.0, ge=0, le=1000, description="timestep below which guidance is 1 (default: 0)"
    )
    boundary: float = Field(
        default=0.875, gt=0, lt=1, description="sigma at which the experts switch (default: 0.875)"
    )
    context_scale: float | tuple[float, ...] = Field(
        default=1.0,
        description=(
            "weight of the VACE branch: one number, or one per branch block; on the command line, "
            "1,0.8,0.5 (default: 1)"
        ),
    )
    diffsynth_noise: bool = Field(
        default=False,
        description="with references, order the noise as DiffSynth-Studio does (default: false)",
    )
    diffsynth_references: bool = Field(
        default=False,
        description=(
            "stretch references to the video's size, as DiffSynth-Studio's VACE examples do (default: false)"
        ),
    )
    videoxfun_sigmas: bool = Field(
        default=False,
        description=(
            "use the sigmas of VideoX-Fun's sampler Flow, which are shifted twice; implies solver "
            "euler (default: false)"
        ),
    )
    seed: int = Field(default=2025, ge=0, lt=1 << 63, description="seed of the noise (default: 2025)")

    @field_validator("height", "width")
    @classmethod
    def _is_whole_tokens(cls, value: int) -> int:
        if value % WAN.token_side:
            nearest = WAN.nearest_side(value)
            raise ValueError(f"must be a multiple of {WAN.token_side}; nearest: {nearest}")
        return value

    @field_validator("context_scale")
    @classmethod
    def _is_a_weight(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        for scale in value if isinstance(value, tuple) else (value,):
            if abs(scale) > 1000:
                raise ValueError(f"expected numbers from -1000 to 1000, got {scale:g}")
        return value

    @field_validator("timesteps")
    @classmethod
    def _falls(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not all(
            1000 >= high > low for high, low in zip(value, (*value[1:], 0.0), strict=True)
        ):
            raise ValueError("must fall, from at most 1000 to above 0")
        return value

    @model_validator(mode="after")
    def _euler_alone(self) -> Numbers:
        if self.videoxfun_sigmas and "solver" in self.model_fields_set and self.solver != "euler":
            raise ValueError(
                f"videoxfun_sigmas belongs to solver euler, but solver is {self.solver}; remove one of them"
            )
        return self


class SamplingConfig(Numbers):
    """The complete sampling settings of one video, with all presets resolved."""

    grid: Literal["official", "diffusers"] = "official"

    @property
    def needs_guidance(self) -> bool:
        """Whether any step needs the negative prompt."""
        return self.guidance_scale != 1 or self.guidance_scale_2 != 1
