"""Sigmas, timesteps, loss weights and the places of the schedule that an expert may draw. Pure, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Everything that training draws from. All tensors fp32 on the CPU."""

    sigmas: Tensor  # [N], falling from 1
    timesteps: Tensor  # [N], N · sigma
    weights: Tensor  # [N], loss weight of each place
    places: Tensor  # [n] int64, the places that may be drawn


def shifted(u: Tensor, shift: float) -> Tensor:
    """The warp s·u / (1 + (s − 1)·u) of an even grid; 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def training_sigmas(config: ScheduleConfig) -> Tensor:
    """fp32 [N]: the shifted grid, computed in fp64, from 1 down to just above sigma_min."""
    n = config.num_train_timesteps
    grid = torch.linspace(1.0, config.sigma_min, n + config.extra_one_step, dtype=torch.float64)
    return shifted(grid[:n], config.shift).float()


def bell_weights(timesteps: Tensor, num_train_timesteps: int) -> Tensor:
    """fp32 [N]: a bell over the timestep, moved down to 0 at its ends and scaled to mean 1."""
    half = num_train_timesteps / 2
    y = torch.exp(-2 * ((timesteps.double() - half) / num_train_timesteps) ** 2)
    y = y - y.min()
    return (y * len(y) / y.sum()).float()


def expert_places(config: ScheduleConfig) -> range:
    """The places of this model: all; sigma ≥ boundary for `high`, the rest for `low`; else the older keys' range."""
    n = config.num_train_timesteps
    if config.role is None:
        low, high = config.old_range
        return range(int(low * n), int(high * n))
    first_low = int((training_sigmas(config) >= config.boundary).sum())
    return range(0, first_low) if config.role == "high" else range(first_low, n)


def boundary_mismatch(config: ScheduleConfig) -> str | None:
    """What to tell a user whose older keys put the switch elsewhere than `boundary`; None where they agree.

    Published A14B examples train the experts apart at timestep 900 and generate with a switch at 875.
    """
    if config.inferred_expert is None:
        return None
    low, high = config.old_range
    key, fraction = (
        ("max_timestep_boundary", high) if config.inferred_expert == "high" else ("min_timestep_boundary", low)
    )
    places = expert_places(config)
    ours = places.stop if config.inferred_expert == "high" else places.start
    theirs = round(fraction * config.num_train_timesteps)
    if ours == theirs:
        return None
    sigma = float(training_sigmas(config)[min(theirs, config.num_train_timesteps - 1)])
    return (
        f"diffusion.{key} {fraction} splits the experts at sigma {sigma:.3f}, diffusion.boundary at {config.boundary}; "
        f"boundary decides, in training as in generation ({abs(ours - theirs)} places would go to the wrong expert); "
        f"set diffusion.expert and diffusion.boundary instead"
    )


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The tables of one run. A place whose weight is 0 (timestep 1000 under the bell) teaches nothing and is not drawn."""
    sigmas = training_sigmas(config)
    timesteps = sigmas * config.num_train_timesteps
    bell = config.loss_weighting == "bell"
    weights = bell_weights(timesteps, config.num_train_timesteps) if bell else torch.ones_like(sigmas)
    span = expert_places(config)
    if config.normalize_per_expert and len(span):
        weights = weights / weights[span.start : span.stop].mean()
    places = torch.tensor([place for place in span if weights[place] > 0], dtype=torch.int64)
    if not len(places):
        raise ConfigError(f"diffusion: expert {config.role} with boundary {config.boundary} has no timestep to train on")
    return Schedule(sigmas=sigmas, timesteps=timesteps, weights=weights, places=places)
