"""Shared code of the solvers built on a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.generation.solvers.solver import Stepper

# Arguments of diffusers' multistep schedulers for a model that predicts velocity. Their own shift must be 1.
FLOW: Mapping[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
}


def numpy_line(start: float, end: float, steps: int) -> Tensor:
    """Return fp64 [steps], evenly spaced from `start` and without `end`.

    The published samplers build their grids with numpy. torch differs in the last bits, which would change
    some rounded timesteps by one.
    """
    return torch.from_numpy(np.linspace(start, end, steps + 1)[:-1].copy())


def with_tables(scheduler: Any, sigmas: Tensor, timesteps: Tensor) -> Stepper:
    """Return a diffusers scheduler at its first step, with exactly these sigmas [N+1] and timesteps [N].

    Its own shift must be 1. The tables are replaced after set_timesteps, because passing `sigmas=` to it
    would shift them again.

    """
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas = sigmas.clone()
    scheduler.timesteps = timesteps.clone()
    scheduler.num_inference_steps = len(timesteps)
    scheduler.set_begin_index(0)  # rounded timesteps may repeat, so the scheduler must not search for them
    stepper: Stepper = scheduler
    return stepper
