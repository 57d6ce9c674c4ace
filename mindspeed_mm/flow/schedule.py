"""Training schedule: sigmas, timesteps, loss weights, and the indices that an expert trains on.

Pure functions on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """The tables that training draws from. Float tensors are fp32, all on the CPU."""

    sigmas: Tensor  # [N], falling from 1
    timesteps: Tensor  # [N], N · sigma
    weights: Tensor  # [N], loss weight of each index
    indices: Tensor  # [n] int64, the indices that may be drawn


def shifted(u: Tensor, shift: float) -> Tensor:
    """Shift an even grid by s·u / (1 + (s − 1)·u), which keeps 0 and 1."""
    return shift * u / (1 + (shift - 1) * u)


def training_sigmas(config: ScheduleConfig) -> Tensor:
    """Return the shifted grid, fp32 [N], falling from 1. It is computed in fp64."""
    return torch.tensor(
        [config.sigma(index) for index in range(config.num_train_timesteps)], dtype=torch.float32
    )


def bell_weights(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """Return a bell curve over the timesteps, fp32 [N], shifted to a minimum of 0 and scaled to mean 1."""
    half = num_train_timesteps / 2
    y = torch.exp(-2 * ((timesteps.double() - half) / num_train_timesteps) ** 2)
    y = y - y.min()
    return (y * len(y) / y.sum()).float()


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Build the tables of one run. Raises ConfigError if no timestep is left to train on.

    Indices of weight 0, such as timestep 1000 with bell weights, would give no gradient and are not drawn.
    """
    sigmas = training_sigmas(config)
    timesteps = sigmas * config.num_train_timesteps
    bell = config.loss_weighting == "bell"
    weights = bell_weights(timesteps, config.num_train_timesteps) if bell else torch.ones_like(sigmas)
    span = config.indices
    if config.normalize_per_expert and len(span):
        weights = weights / weights[span.start : span.stop].mean()
    indices = torch.tensor([index for index in span if weights[index] > 0], dtype=torch.int64)
    if not len(indices):
        raise ConfigError(
            f"expert {config.role} with boundary {config.boundary} has no timestep to train on",
            where="diffusion",
        )
    return Schedule(sigmas=sigmas, timesteps=timesteps, weights=weights, indices=indices)
