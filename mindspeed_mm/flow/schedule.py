"""Sigmas, timesteps, loss weights, and the places of the schedule that an expert may draw.

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
    weights: Tensor  # [N], loss weight of each place
    places: Tensor  # [n] int64, the places that may be drawn


def shifted(u: Tensor, shift: float) -> Tensor:
    """The warp s·u / (1 + (s − 1)·u) of an even grid; 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def training_sigmas(config: ScheduleConfig) -> Tensor:
    """fp32 [N]: the shifted grid, falling from 1, computed in fp64."""
    return torch.tensor(
        [config.sigma(place) for place in range(config.num_train_timesteps)], dtype=torch.float32
    )


def bell_weights(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """fp32 [N]: a bell curve over the timestep, lowered to 0 at its ends and scaled to mean 1."""
    half = num_train_timesteps / 2
    y = torch.exp(-2 * ((timesteps.double() - half) / num_train_timesteps) ** 2)
    y = y - y.min()
    return (y * len(y) / y.sum()).float()


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The tables of one run.

    A place of weight 0 (timestep 1000 under the bell) has no gradient and is not drawn.
    """
    sigmas = training_sigmas(config)
    timesteps = sigmas * config.num_train_timesteps
    bell = config.loss_weighting == "bell"
    weights = bell_weights(timesteps, config.num_train_timesteps) if bell else torch.ones_like(sigmas)
    span = config.places
    if config.normalize_per_expert and len(span):
        weights = weights / weights[span.start : span.stop].mean()
    places = torch.tensor([place for place in span if weights[place] > 0], dtype=torch.int64)
    if not len(places):
        raise ConfigError(
            f"expert {config.role} with boundary {config.boundary} has no timestep to train on",
            where="diffusion",
        )
    return Schedule(sigmas=sigmas, timesteps=timesteps, weights=weights, places=places)
