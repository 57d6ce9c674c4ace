"""Held-out loss at fixed timesteps with fixed noise.

Evaluations are comparable: each uses the same records, timesteps and noise, on any number of ranks. The
results are the mean of all records at each timestep, the mean of each task, and intervals that account for
the choice of records.
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

Interval = Callable[
    [Sequence[float]], tuple[float, float] | None
]  # losses of records → interval (low, high) of their mean
LOW, HIGH = "/low", "/high"  # suffixes for the bounds of an interval


def quantile_places(schedule: Schedule, quantiles: int) -> list[int]:
    """Return the middle place of each of `quantiles` equal parts of the schedule that the model trains on."""
    count = len(schedule.places)
    return [int(schedule.places[(2 * q + 1) * count // (2 * quantiles)]) for q in range(quantiles)]


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

    Every rank runs the model equally often, as sharded models require. A rank without a record of its own
    repeats the last record, which is not counted again.
    """
    places = quantile_places(schedule, quantiles)
    records = range(min(len(source), max_records))
    totals = torch.zeros(quantiles + 1, dtype=torch.float32, device=device)
    each = torch.zeros(len(records), quantiles, dtype=torch.float32, device=device)
    tasks: list[str] = list(getattr(source, "tasks", ()))
    task_of = torch.full((len(records),), -1.0, device=device)
    collate = Collate(seed=seed, with_context=with_context)
    was_training = model.training
    model.eval()
    for first in range(0, len(records), dp_size):
        record = records[min(first + dp_rank, len(records) - 1)]
        counts = float(first + dp_rank < len(records))
        features = raise_on_all_ranks(partial(source.__getitem__, record))
        batch = collate.stack([(features, record)])
        moved = batch.to(device)
        if counts and batch.tasks and batch.tasks[0] in tasks:
            task_of[record] = float(tasks.index(batch.tasks[0]))
        for q, place in enumerate(places):
            sample = sample_flow_at(moved.latents, schedule, place, batch.sample_index, seed)
            velocity: Tensor = model(sample.noisy, sample.timestep, moved.prompt_embeds, moved.vace_context)
            loss = sample_losses(velocity, sample, batch.num_refs if exclude_refs else 0)
            totals[q] += counts * loss.sum()
            if counts:
                each[record, q] = loss.sum()
        totals[-1] += counts
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
        dist.all_reduce(
            each, op=dist.ReduceOp.MAX
        )  # ranks of one context-parallel group have the same record
        dist.all_reduce(task_of, op=dist.ReduceOp.MAX)
    *sums, count = totals.tolist()
    means = [total / count for total in sums]
    names = [f"timestep_{float(schedule.timesteps[place]):.0f}" for place in places]
    found = {f"validation/{name}": mean for name, mean in zip(names, means, strict=True)}
    found["validation/loss"] = sum(means) / len(means)
    for number, task in enumerate(tasks if len(tasks) > 1 else ()):
        rows = each[task_of == number]
        if len(rows):
            name = (task_labels or {}).get(task, task)
            found |= _of_rows(f"validation/task/{name}/", rows, names, interval, with_means=True)
    return {**found, **_of_rows("validation/", each, names, interval, with_means=False)}


def _of_rows(
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
