"""The registry of solvers. Their code is imported on first use. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mindspeed_mm.config.names import NameIn
from mindspeed_mm.registry import Registry


@dataclass(frozen=True)
class SolverSpec:
    """A sampler, selected by `solver` in the inference JSON."""

    build: str  # "module:callable", build(sigmas [N+1], timesteps [N], seed) → Stepper at its first step
    # "module:callable", grid(sampling) → fp64 [N] decreasing sigmas, shifted and without the final 0
    grid: str = "mindspeed_mm.generation.solvers.euler:sigmas"
    whole_timesteps: bool = False  # whether to round timesteps down, as the published samplers do
    free_timesteps: bool = False  # whether the `timesteps` of a request can replace the grid


SOLVERS: Registry[SolverSpec] = Registry("solver", "mindspeed_mm.solvers")
SOLVERS.add(
    "unipc",
    SolverSpec(
        build="mindspeed_mm.generation.solvers.unipc:build",
        grid="mindspeed_mm.generation.solvers.unipc:sigmas",
        whole_timesteps=True,
    ),
)
SOLVERS.add(
    "dpm++",
    SolverSpec(
        build="mindspeed_mm.generation.solvers.dpm:build",
        grid="mindspeed_mm.generation.solvers.dpm:sigmas",
        whole_timesteps=True,
    ),
)
SOLVERS.add("euler", SolverSpec(build="mindspeed_mm.generation.solvers.euler:build", free_timesteps=True))
SOLVERS.add(
    "renoise", SolverSpec(build="mindspeed_mm.generation.solvers.renoise:Renoise", free_timesteps=True)
)

SolverName = Annotated[str, NameIn(SOLVERS)]
