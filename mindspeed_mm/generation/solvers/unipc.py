"""`unipc`: the default of the official code, on its grid or on diffusers' (preset `diffusers`)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mindspeed_mm.flow.schedule import shifted
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.scheduler import FLOW, numpy_line, with_tables
from mindspeed_mm.generation.solvers.solver import Stepper

_START = float(np.float32(0.999))  # the official scheduler keeps its first sigma in fp32


def sigmas(sampling: SamplingConfig) -> Tensor:
    """Return fp64 sigmas [N], starting just below 1, where log(1 - sigma) is finite."""
    if sampling.grid == "official":
        return shifted(numpy_line(_START, 0.0, sampling.steps), sampling.shift)
    line = shifted(numpy_line(1.0, 0.001, sampling.steps), sampling.shift)
    line[0] -= 1e-6 if abs(line[0] - 1) < 1e-6 else 0.0  # as diffusers does
    return line


def build(sigmas: Tensor, timesteps: Tensor, seed: int) -> Stepper:
    """Build diffusers' UniPC scheduler."""
    from diffusers import UniPCMultistepScheduler

    return with_tables(UniPCMultistepScheduler(**FLOW), sigmas, timesteps)
