"""Held-out loss at fixed timesteps with fixed noise.

Evaluations are comparable: each uses the same records, timesteps and noise, on any number of ranks. The
results are the mean of all records at each timestep, the mean of each task, and confidence intervals over the
records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.data.loader import Collate, FeatureSource
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.flow.matching import sample_flow_at, sample_losses
from mindspeed_mm.flow.schedule import Schedule

# losses of records → interval (low, high) of their mean
Interval = Callable[[Sequence[float]], tuple[float, float] | None]
LOW, HIGH = "/low", "/high"  # suffixes for the bounds of an interval


def quantile_indices(schedule: Schedule, quantiles: int) -> list[int]:
    """Return the middle schedule index of each of `quantiles` equal parts of the trained schedule."""
    count = len(schedule.indices)
    return [int(schedule.indices[(2 * q + 1) * count // (2 * quantiles)]) for q in range(quantiles)]


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    source: FeatureSource,
    schedule: Schedule,
    *,
    quantiles: int,
    max_records: int,
    seed: int,
    exclude_refs: bool,
    with_context: bool = True,
    device: torch.device,
    dp_rank: int = 0,
    dp_size: int = 1,
    interval: Interval | None = None,
    task_labels: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Measure the unweighted mean squared error of the first `max_records` held-out records.

    Returns the error at the timestep of each quantile, and the mean of these errors. If there are several
    tasks, the result also has these values for the records of each task. `interval` adds NAME/low and
    NAME/high. `task_labels` maps a task to the name under which training reports its loss.

    Every rank runs the model the same number of times, as sharded models require. A rank without a record of
    its own repeats the last record, which is not counted again.
    """
    indices = quantile_indices(schedule, quantiles)
    records = range(min(len(source), max_records))
    totals = torch.zeros(quantiles + 1, dtype=torch.float32, device=device)
    record_losses = torch.zeros(len(records), quantiles, dtype=torch.float32, device=device)
    tasks: list[str] = list(getattr(source, "tasks", ()))
    task_of = torch.full((len(records),), -1.0, device=device)
    collate = Collate(seed=seed, with_context=with_context)
    was_training = model.training
    model.eval()
    for first in range(0, len(records), dp_size):
        record = records[min(first + dp_rank, len(records) - 1)]
        weight = float(first + dp_rank < len(records))
        features = raise_on_all_ranks(partial(source.__getitem__, record))
        batch = collate.stack([(features, record)])
        device_batch = batch.to(device)
        if weight and batch.tasks and batch.tasks[0] in tasks:
            task_of[record] = float(tasks.index(batch.tasks[0]))
        for q, index in enumerate(indices):
            sample = sample_flow_at(device_batch.latents, schedule, index, batch.sample_index, seed)
            velocity: Tensor = model(
                sample.noisy, sample.timestep, device_batch.prompt_embeds, device_batch.vace_context
            )
            loss = sample_losses(velocity, sample, batch.num_refs if exclude_refs else 0)
            totals[q] += weight * loss.sum()
            if weight:
                record_losses[record, q] = loss.sum()
        totals[-1] += weight
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
        # Ranks of one context-parallel group have the same record.
        dist.all_reduce(record_losses, op=dist.ReduceOp.MAX)
        dist.all_reduce(task_of, op=dist.ReduceOp.MAX)
    *sums, count = totals.tolist()
    means = [total / count for total in sums]
    names = [f"timestep_{float(schedule.timesteps[index]):.0f}" for index in indices]
    found = {f"validation/{name}": mean for name, mean in zip(names, means, strict=True)}
    found["validation/loss"] = sum(means) / len(means)
    for number, task in enumerate(tasks if len(tasks) > 1 else ()):
        rows = record_losses[task_of == number]
        if len(rows):
            name = (task_labels or {}).get(task, task)
            found |= _row_metrics(f"validation/task/{name}/", rows, names, interval, with_means=True)
    return {**found, **_row_metrics("validation/", record_losses, names, interval, with_means=False)}


def _row_metrics(
    prefix: str, rows: Tensor, names: Sequence[str], interval: Interval | None, *, with_means: bool
) -> dict[str, float]:
    """Return the means of `rows` [N, quantiles] per timestep and over all timesteps, and their intervals."""
    found: dict[str, float] = {}
    columns = {**dict(zip(names, rows.T.tolist(), strict=True)), "loss": rows.mean(1).tolist()}
    for name, losses in columns.items():
        if with_means:
            found[f"{prefix}{name}"] = sum(losses) / len(losses)
        bounds = interval(losses) if interval is not None else None
        if bounds is not None:
            found[f"{prefix}{name}{LOW}"], found[f"{prefix}{name}{HIGH}"] = bounds
    return found
