"""Held-out loss at fixed timesteps with fixed noise.

Every evaluation measures the same, on any number of ranks.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.data.loader import Collate, FeatureSource
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.flow.matching import sample_flow_at, sample_losses
from mindspeed_mm.flow.schedule import Schedule


def quantile_places(schedule: Schedule, quantiles: int) -> list[int]:
    """The middle place of each of `quantiles` equal parts of what this model trains on."""
    count = len(schedule.places)
    return [int(schedule.places[(2 * q + 1) * count // (2 * quantiles)]) for q in range(quantiles)]


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    source: FeatureSource,
    schedule: Schedule,
    *,
    quantiles: int,
    most: int,
    seed: int,
    exclude_refs: bool,
    with_context: bool = True,
    device: torch.device,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> dict[str, float]:
    """Unweighted mean squared error of the first `most` held-out records.

    At each quantile's timestep, and their mean.

    Every rank runs the model equally often, as sharded models need; a rank with nothing left repeats and does
    not count.
    """
    places = quantile_places(schedule, quantiles)
    records = range(min(len(source), most))
    totals = torch.zeros(quantiles + 1, dtype=torch.float32, device=device)
    collate = Collate(seed=seed, with_context=with_context)
    was_training = model.training
    model.eval()
    for first in range(0, len(records), dp_size):
        record = records[min(first + dp_rank, len(records) - 1)]
        counts = float(first + dp_rank < len(records))
        features = raise_on_all_ranks(partial(source.__getitem__, record))
        batch = collate.stack([(features, record)])
        moved = batch.to(device)
        for q, place in enumerate(places):
            sample = sample_flow_at(moved.latents, schedule, place, batch.sample_index, seed)
            velocity: Tensor = model(sample.noisy, sample.timestep, moved.prompt_embeds, moved.vace_context)
            loss = sample_losses(velocity, sample, batch.num_refs if exclude_refs else 0)
            totals[q] += counts * loss.sum()
        totals[-1] += counts
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    *sums, count = totals.tolist()
    means = [total / count for total in sums]
    named = {
        f"validation/timestep_{float(schedule.timesteps[place]):.0f}": mean
        for place, mean in zip(places, means, strict=True)
    }
    return {**named, "validation/loss": sum(means) / len(means)}
