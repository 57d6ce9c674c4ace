"""`euler`: one step along the velocity. Its grid is linear from 1 to 0, then shifted."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_mm.flow.schedule import shifted
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.scheduler import with_tables
from mindspeed_mm.generation.solvers.solver import Stepper


def sigmas(sampling: SamplingConfig) -> Tensor:
    """Return fp64 sigmas [N], starting at 1. The last step ends at 0."""
    line = torch.linspace(1.0, 0.0, sampling.steps + 1, dtype=torch.float64)[:-1]
    return shifted(line, sampling.shift)


def build(sigmas: Tensor, timesteps: Tensor, seed: int) -> Stepper:
    """Build diffusers' Euler scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return with_tables(FlowMatchEulerDiscreteScheduler(shift=1.0), sigmas, timesteps)
