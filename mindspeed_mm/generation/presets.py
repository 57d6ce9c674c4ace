"""Resolves a request and its preset to the complete sampling settings of a video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.loras_config import FEW_STEPS
from mindspeed_mm.generation.sampling_config import Numbers, SamplingConfig
from mindspeed_mm.generation.solvers.config import SOLVERS


def resolve_sampling(request: RequestConfig, *, experts: int) -> SamplingConfig:
    """Fill in the unset values of `request` from its preset. `experts` is 1 or 2. Raises ConfigError."""
    given = request.model_dump(include=set(Numbers.model_fields), exclude_unset=True)
    flow = {"solver": "euler"} if given.get("videoxfun_sigmas") else {}
    values = {**_preset(given, experts), **flow, **given}
    values.setdefault("guidance_scale_2", values.get("guidance_scale", SamplingConfig().guidance_scale))
    if values.get("timesteps") is not None:
        _follow_timesteps(values, given)
    sampling = SamplingConfig(**values)
    _check_windows(request, sampling)
    bounds = phase_bounds(sampling, experts)
    for number, lora in enumerate(request.loras):
        if lora.by_phase and len(lora.strengths) > len(bounds) + 1:
            raise ConfigError(
                f"{len(lora.strengths)} numbers for {len(bounds) + 1} phases",
                where=f"loras[{number}].strength",
                fix="use one per phase; phases end at guidance_end and, with two experts, at boundary",
            )
        if not lora.by_phase and len(lora.strengths) not in (1, sampling.steps):
            raise ConfigError(
                f"{len(lora.strengths)} numbers for {sampling.steps} steps",
                where=f"loras[{number}].strength",
                fix="use one number, or one for each step",
            )
    return sampling


def changed_from_preset(sampling: SamplingConfig) -> str:
    """Return the differences of a video from its few-step preset, such as `steps 50 instead of 4`, or ""."""
    numbers: Mapping[str, Any] = FEW_STEPS[sampling.preset][0] if sampling.preset in FEW_STEPS else {}
    mine = {key: getattr(sampling, key) for key in numbers}
    return ", ".join(
        f"{key} {mine[key]} instead of {value}" for key, value in numbers.items() if mine[key] != value
    )


def _check_windows(request: RequestConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError if there are more window prompts or reference lists than windows."""
    count = len(sampling.windows)
    for key, given in (
        ("window_prompts", request.window_prompts),
        ("window_references", sampling.window_references),
    ):
        if given is not None and (len(given) > count or sampling.window is None):
            lacks = ", because window is missing" if sampling.window is None else ""
            raise ConfigError(
                f"{len(given)} for {count} window{'s' * (count != 1)}{lacks}",
                where=key,
                fix="set window to 81" if lacks else "remove the others, or raise num_frames",
            )


def phase_bounds(sampling: SamplingConfig, experts: int) -> tuple[float, ...]:
    """Return the timesteps below which a new phase begins: where guidance ends, and the experts switch."""
    found = {sampling.guidance_end} if sampling.guidance_end else set()
    return tuple(sorted(found | ({1000 * sampling.boundary} if experts == 2 else set()), reverse=True))


def _follow_timesteps(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Set steps to the number of timesteps. Raises ConfigError if another key contradicts them."""
    count = len(values["timesteps"])
    origin = "timesteps" if "timesteps" in given else f"preset {values['preset']}"
    if given.get("steps", count) != count:
        raise ConfigError(
            f"got {given['steps']}, but {origin} has {count} timesteps", where="steps", fix="remove it"
        )
    values["steps"] = count
    if "timesteps" in given and "solver" not in given:
        values["solver"] = values["solver"] if SOLVERS.get(values["solver"]).free_timesteps else "euler"
    if not SOLVERS.get(values["solver"]).free_timesteps or values.get("videoxfun_sigmas"):
        free = ", ".join(name for name in SOLVERS if SOLVERS.get(name).free_timesteps)
        raise ConfigError(
            f"{origin} needs a solver for free timesteps ({free}), without videoxfun_sigmas",
            where="solver",
            fix="remove it",
        )


def _preset(given: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Return the solver, grid and shift of the preset.

    They follow the official code, DiffSynth, or diffusers, whose shift depends on the frame size.
    """
    name = given.get("preset", "wan")
    if name in FEW_STEPS:
        return dict(FEW_STEPS[name][0])
    if name == "diffsynth":
        return {"solver": "euler", "shift": 5.0}
    if name == "mindspeed":
        return {
            "solver": "euler",
            "shift": 5.0,
            "seed": 1,
            "fps": 15.0,
            "timing": "frames",
            "diffsynth_noise": True,
            "diffsynth_references": True,
        }
    if name == "diffusers":
        default = SamplingConfig()
        pixels = given.get("height", default.height) * given.get("width", default.width)
        return {"solver": "unipc", "grid": "diffusers", "shift": 3.0 if pixels <= 480 * 832 else 5.0}
    return {"solver": "unipc", "shift": 16.0 if experts == 1 else 12.0}
