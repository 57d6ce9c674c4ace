"""The LoRAs of a video, and the presets for few-step LoRAs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config

Which = Literal["high", "low", "both"]


class LoraUse(Config):
    """One LoRA and its strength."""

    path: str = Field(
        min_length=1,
        description="a LoRA file or folder of any dialect, or a checkpoint of a LoRA training run",
    )
    strength: float | tuple[float, ...] | str = Field(
        default=1.0,
        description=(
            "factor of the LoRA: one number, a list with one number per denoising step, or a "
            "string such as 0;1 with one number per phase; phases end at guidance_end and, with "
            "two experts, at boundary"
        ),
    )
    on: Which = Field(default="both", description="expert of A14B that gets the LoRA")

    @model_validator(mode="before")
    @classmethod
    def _as_object(cls, value: Any) -> Any:
        """Parse `style.safetensors`, `style.safetensors=0.7`, `…=1,1,0.5` or `…=0;1`, as in a flag."""
        if not isinstance(value, str):
            return value
        path, equals, number = value.rpartition("=")
        try:
            if not equals:
                return {"path": value}
            numbers = tuple(float(part) for part in number.replace(";", ",").split(","))
            strength = number if ";" in number else numbers if len(numbers) > 1 else numbers[0]
            return {"path": path, "strength": strength}
        except ValueError:
            return {"path": value}

    @model_validator(mode="after")
    def _bounded(self) -> LoraUse:
        try:
            found = self.strengths
        except ValueError:
            raise ValueError("strength: expected a number, a list, or numbers with ; between them") from None
        for strength in found:
            if not abs(strength) <= 1000:
                raise ValueError(f"strength: expected numbers from -1000 to 1000, got {strength:g}")
        return self

    @property
    def strengths(self) -> tuple[float, ...]:
        """All numbers in `strength`. Raises ValueError for a string that does not parse."""
        if isinstance(self.strength, str):
            return tuple(float(part) for part in self.strength.split(";"))
        return self.strength if isinstance(self.strength, tuple) else (self.strength,)

    @property
    def by_phase(self) -> bool:
        """Whether there is one number per phase; the last one also applies to all later phases."""
        return isinstance(self.strength, str)

    def at(self, step: int, phase: int = 0) -> float:
        """Return the strength at a denoising step and phase, both counted from 0."""
        numbers = self.strengths
        return numbers[min(phase if self.by_phase else step, len(numbers) - 1)]


_LIGHTX2V = "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"
# Preset → (its sampling settings, the LoRA they are meant for).
FEW_STEPS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "lightx2v-4step": (
        {"solver": "euler", "steps": 4, "shift": 5.0, "guidance_scale": 1.0},
        f"{_LIGHTX2V}; of A14B one for each expert, such as Wan2.2-Lightning",
    ),
    "lightx2v-8step": ({"solver": "euler", "steps": 8, "shift": 5.0, "guidance_scale": 1.0}, _LIGHTX2V),
    "causvid": (
        {
            "solver": "renoise",
            "timesteps": (999.0, 934.0, 862.0, 756.0, 603.0, 410.0, 250.0, 140.0, 74.0),
            "shift": 8.0,
            "guidance_scale": 1.0,
        },
        "Wan21_CausVid_14B_T2V_lora_rank32.safetensors",
    ),
    "fusionix": (
        {"solver": "unipc", "steps": 8, "shift": 2.0, "guidance_scale": 1.0},
        "Wan2.1_T2V_14B_FusionX_LoRA.safetensors",
    ),
    "self-forcing": (
        {"solver": "euler", "steps": 4, "shift": 3.0, "guidance_scale": 1.0},
        "a self-forcing LoRA or checkpoint of 14B",
    ),
    "vace-3phase": (
        {
            "solver": "euler",
            "steps": 8,
            "shift": 3.0,
            "guidance_scale": 3.5,
            "guidance_scale_2": 1.0,
            "guidance_end": 965.0,
            "boundary": 0.8,
        },
        "a 4-step LoRA for each expert of A14B; the high-noise one with strength 0;1",
    ),
}
