"""One training iteration: noise, forward, loss and backward per micro-batch, then one clipped update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.data.sample import Batch
from mindspeed_mm.distributed.fsdp import set_last_micro_batch
from mindspeed_mm.distributed.pipeline import Pipeline
from mindspeed_mm.flow.matching import FlowSample, sample_flow, sample_losses
from mindspeed_mm.flow.schedule import Schedule
from mindspeed_mm.ops.stages import MicroBatch
from mindspeed_mm.training.optim import clip_gradients
from mindspeed_mm.training.timers import PhaseTimers


@dataclass(frozen=True)
class SampleNote:
    """One sample of an iteration, for the spike log and the non-finite guard."""

    key: str
    sample_index: int
    timestep: float
    loss: float  # unweighted


@dataclass
class LocalWork:
    """Losses and samples of one rank in one iteration, before the reduction over ranks."""

    losses: list[Tensor] = field(default_factory=list)  # weighted, one scalar for each micro-batch
    sample_losses: list[Tensor] = field(default_factory=list)  # unweighted, [B] for each micro-batch
    timesteps: list[Tensor] = field(default_factory=list)  # [B] for each micro-batch
    keys: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    sample_indices: list[int] = field(default_factory=list)
    sizes: list[tuple[int, ...]] = field(default_factory=list)  # (R+F, h, w, text rows) of every sample

    def add(self, batch: Batch, loss: Tensor, losses: Tensor, timesteps: Tensor) -> None:
        """Record one micro-batch. Tensors stay on the device until `notes` reads them."""
        self.losses.append(loss.detach())
        self.sample_losses.append(losses.detach())
        self.timesteps.append(timesteps)
        self.keys += batch.keys
        self.tasks += batch.tasks or ("",) * len(batch.keys)
        self.sample_indices += batch.sample_index.tolist()
        self.sizes += [(*batch.latents.shape[2:], batch.prompt_embeds.shape[1])] * len(batch.keys)

    def notes(self) -> list[SampleNote]:
        """Return every sample with its loss. Waits for the device."""
        losses, timesteps = torch.cat(self.sample_losses).tolist(), torch.cat(self.timesteps).tolist()
        rows = zip(self.keys, self.sample_indices, timesteps, losses, strict=True)
        return [SampleNote(key, index, timestep, loss) for key, index, timestep, loss in rows]


@dataclass(frozen=True)
class TaskSettings:
    """Settings for the samples of one task."""

    schedule: Schedule
    loss_weight: float = 1.0


@dataclass(frozen=True)
class StepSettings:
    """Settings of the job that a training step needs."""

    micro_batches: int
    schedule: Schedule
    seed: int
    exclude_refs: bool  # ref_loss: exclude
    clip_grad: float
    tasks: Mapping[str, TaskSettings] = field(default_factory=dict)  # only tasks with their own settings


def accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: StepSettings,
    device: torch.device,
    timers: PhaseTimers,
) -> LocalWork:
    """Run forward and backward for all micro-batches.

    Gradients are averaged over the micro-batches and, after the last one, over ranks.
    """
    if isinstance(model, Pipeline):
        return accumulate_stages(model, batches, settings, device, timers)
    work = LocalWork()
    for number, on_host in enumerate(batches, 1):
        with timers.phase("data"):
            batch = on_host.to(device)
        set_last_micro_batch(model, number == len(batches))
        with timers.phase("forward"):
            sample = draw(batch, on_host, settings)
            velocity = model(sample.noisy, sample.timestep, batch.prompt_embeds, batch.vace_context)
            loss, losses = weighted_loss(velocity, sample, batch, settings)
        with timers.phase("backward"):
            (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        work.add(on_host, loss, losses, sample.timestep)
    return work


def draw(batch: Batch, on_host: Batch, settings: StepSettings) -> FlowSample:
    """Draw the noise and timesteps of a micro-batch. Each sample uses the schedule of its task."""
    own = [settings.tasks.get(task) for task in batch.tasks] if settings.tasks else []
    schedules = [settings.schedule if one is None else one.schedule for one in own] or settings.schedule
    return sample_flow(batch.latents, schedules, on_host.sample_index, settings.seed)


def weighted_loss(
    velocity: Tensor, sample: FlowSample, batch: Batch, settings: StepSettings
) -> tuple[Tensor, Tensor]:
    """Return the scalar loss for backward, and the unweighted loss of each sample [B]."""
    losses = sample_losses(velocity, sample, batch.num_refs if settings.exclude_refs else 0)
    weights = sample.weight
    if settings.tasks:
        own = [settings.tasks.get(task) for task in batch.tasks]
        factors = [1.0 if one is None else one.loss_weight for one in own]
        weights = weights * torch.tensor(factors, device=weights.device)
    return (weights * losses).mean(), losses


def accumulate_stages(
    pipeline: Pipeline,
    batches: Sequence[Batch],
    settings: StepSettings,
    device: torch.device,
    timers: PhaseTimers,
) -> LocalWork:
    """Run `accumulate` over the stages of a pipeline.

    The rank of the last stage computes the losses, and every rank returns them.
    """
    with timers.phase("data"):
        moved = [batch.to(device) for batch in batches]
    samples = [draw(here, on_host, settings) for here, on_host in zip(moved, batches, strict=True)]
    inputs = [
        MicroBatch(sample.noisy, sample.timestep, batch.prompt_embeds, batch.vace_context)
        for sample, batch in zip(samples, moved, strict=True)
    ]
    # One row per micro-batch: its loss, then the losses of its samples.
    found = torch.zeros(len(inputs), 1 + len(batches[0].keys), device=device)

    def loss(velocity: Tensor, number: int) -> Tensor:
        mean, losses = weighted_loss(velocity, samples[number], moved[number], settings)
        found[number] = torch.cat([mean.detach().view(1), losses.detach()])
        return mean / len(inputs)

    with timers.phase("forward"):  # includes backward, because pipeline schedules interleave the two
        pipeline.forward_backward(inputs, loss)
        pipeline.broadcast_from_last(found)
    work = LocalWork()
    for batch, row, sample in zip(batches, found, samples, strict=True):
        work.add(batch, row[0], row[1:], sample.timestep)
    return work


def mean_over_ranks(
    values: list[float], losses: list[Tensor], device: torch.device, more: Tensor | None = None
) -> tuple[float, list[float]]:
    """Average the loss, `values` and `more` over all ranks in one small all-reduce.

    Returns the mean loss over micro-batches and ranks, and the means of `values` followed by those of `more`.
    Context-parallel ranks contribute identical numbers, which does not change the means.
    """
    parts = [torch.stack(losses).mean().view(1).float(), torch.tensor(values, device=device).float()]
    vector = torch.cat(parts if more is None else [*parts, more])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector)
        vector /= dist.get_world_size()
    mean, *rest = vector.tolist()
    return float(mean), [float(value) for value in rest]


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: float, clip_grad: float
) -> tuple[float, bool]:
    """Clip the gradients and update the weights, unless the loss or the gradient norm is not finite.

    Returns the gradient norm before clipping, and whether the weights were updated. The loss and the norm are
    the same on every rank, so either all ranks update or none does.
    """
    pipeline = model if isinstance(model, Pipeline) else None
    norm = clip_gradients([p for p in model.parameters() if p.requires_grad], clip_grad, pipeline)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    # No arguments: apex's optimizer accepts none, and the NPU's must keep the memory of its gradients.
    optimizer.zero_grad()
    return norm, finite
