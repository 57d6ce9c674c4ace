"""Flow matching: add noise to a clip, compute the target, and measure the loss. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.flow.schedule import Schedule


@dataclass(frozen=True)
class FlowSample:
    """A noised batch, on the latents' device, fp32."""

    noisy: Tensor  # [B, 16, R+F, h, w]
    target: Tensor  # [B, 16, R+F, h, w], noise − latents
    timestep: Tensor  # [B], 1000 · sigma
    weight: Tensor  # [B]


def keyed_generator(seed: int, index: int, purpose: str = "flow") -> torch.Generator:
    """Return a CPU generator that depends only on (seed, index, purpose), not on rank or earlier draws."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def sample_flow(
    latents: Tensor, schedule: Schedule | Sequence[Schedule], sample_index: Tensor, seed: int
) -> FlowSample:
    """Draw a timestep and noise for each row of latents [B, 16, R+F, h, w].

    Both depend only on `seed` and the consumed-sample index of the row in `sample_index` [B]. `schedule` is
    one schedule for all rows, or one per row.
    """
    schedules = [schedule] * len(latents) if isinstance(schedule, Schedule) else schedule
    positions, noises = [], []
    for row, index in zip(schedules, sample_index.tolist(), strict=True):
        generator = keyed_generator(seed, index)
        drawn = torch.randint(len(row.indices), (), generator=generator)
        positions.append(row.indices[drawn])
        noises.append(torch.randn(latents.shape[1:], generator=generator))
    return _noised(latents, torch.stack(noises), torch.stack(positions), schedules)


def sample_flow_at(
    latents: Tensor, schedule: Schedule, position: int, sample_index: Tensor, seed: int
) -> FlowSample:
    """Like `sample_flow`, but with all rows at index `position` of the schedule."""
    noises = [
        torch.randn(latents.shape[1:], generator=keyed_generator(seed, index, "held-out"))
        for index in sample_index.tolist()
    ]
    positions = torch.full((len(noises),), position)
    return _noised(latents, torch.stack(noises), positions, [schedule] * len(noises))


def sample_losses(velocity: Tensor, sample: FlowSample, num_refs: int = 0) -> Tensor:
    """Return the unweighted mean squared error of each row, fp32 [B], without the first `num_refs` frames."""
    error = velocity.float()[:, :, num_refs:] - sample.target[:, :, num_refs:]
    return error.square().mean(dim=(1, 2, 3, 4))


def _noised(latents: Tensor, noise: Tensor, positions: Tensor, schedules: Sequence[Schedule]) -> FlowSample:
    device = latents.device
    clean, noise = latents.float(), noise.to(device)

    def values(name: str) -> Tensor:
        rows = [getattr(s, name)[i] for s, i in zip(schedules, positions, strict=True)]
        return torch.stack(rows).to(device)

    sigma = values("sigmas").view(-1, 1, 1, 1, 1)
    return FlowSample(
        noisy=(1 - sigma) * clean + sigma * noise,
        target=noise - clean,
        timestep=values("timesteps"),
        weight=values("weights"),
    )
