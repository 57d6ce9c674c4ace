"""The denoising steps of one video: its sigma and timestep tables, and its stepper."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mindspeed_mm.generation.parity import twice_shifted_sigmas
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.config import SOLVERS
from mindspeed_mm.registry import resolve


class Stepper(Protocol):
    """The interface that `SolverSpec.build` returns: the part of a diffusers scheduler used here."""

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """Return the sample after one step, [B, 16, R+F, h, w], as the first element of a tuple."""


class Solver:
    """The denoising steps of one video. It stores earlier velocities, so create a new one for each video."""

    def __init__(self, sampling: SamplingConfig) -> None:
        self.sigmas = sigma_table(sampling)  # [N+1] fp32, ending at 0
        self.timesteps = timestep_table(sampling)  # [N] fp32, as the model sees them
        build = resolve(SOLVERS.get(sampling.solver).build)
        self._stepper: Stepper = build(self.sigmas, self.timesteps, sampling.seed)

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """Return the sample after denoising step `index`. Steps must be taken in order.

        Both tensors are fp32 [B, 16, R+F, h, w].
        """
        return self._stepper.step(velocity, self.timesteps[index], sample, return_dict=False)[0]


def sigma_table(sampling: SamplingConfig) -> Tensor:
    """Return decreasing fp32 sigmas [N+1], ending at 0."""
    return torch.cat((_sigmas(sampling), torch.zeros(1, dtype=torch.float64))).float()


def timestep_table(sampling: SamplingConfig) -> Tensor:
    """Return fp32 timesteps [N]: 1000·sigma, rounded down for multistep solvers, as published samplers do."""
    if sampling.videoxfun_sigmas:
        return _sigmas(sampling).float() * 1000
    timesteps = _sigmas(sampling) * 1000
    is_whole = SOLVERS.get(sampling.solver).whole_timesteps
    return (timesteps.floor() if is_whole else timesteps).float()


def _sigmas(sampling: SamplingConfig) -> Tensor:
    """Return fp64 [N]: the sigmas of the request, or the shifted grid of the solver."""
    if sampling.timesteps is not None:
        return torch.tensor(sampling.timesteps, dtype=torch.float64) / 1000
    if sampling.videoxfun_sigmas:
        return twice_shifted_sigmas(sampling.steps, sampling.shift)
    sigmas: Tensor = resolve(SOLVERS.get(sampling.solver).grid)(sampling)
    return sigmas
