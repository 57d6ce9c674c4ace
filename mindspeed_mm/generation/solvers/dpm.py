"""`dpm++`: second-order DPM-Solver++, on the grid of the official code."""

from __future__ import annotations

from torch import Tensor

from mindspeed_mm.flow.schedule import shifted
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.scheduler import FLOW, numpy_line, with_tables
from mindspeed_mm.generation.solvers.solver import Stepper


def sigmas(sampling: SamplingConfig) -> Tensor:
    """Return fp64 sigmas [N], starting at 1."""
    return shifted(numpy_line(1.0, 0.0, sampling.steps), sampling.shift)


def build(sigmas: Tensor, timesteps: Tensor, seed: int) -> Stepper:
    """Build diffusers' DPM-Solver++ scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **FLOW)
    return with_tables(scheduler, sigmas, timesteps)
