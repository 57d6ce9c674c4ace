"""Adapts the schedules of torch.distributed.pipelining for `Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)

from mindspeed_mm.distributed.pipeline import Loss
from mindspeed_mm.ops.stages import MicroBatch, Split


class Stage(PipelineStage):
    """A stage that reduces gradients over ranks only after the last group of micro-batches."""

    reduces = True

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.reduces:
            super().perform_reduce_grad(grad_scale_factor)

    def _post_metadata_inference_cleanup(self) -> None:
        """Skip torch's cleanup, which drops the previous group's gradients. Our shapes are not inferred."""


@dataclass
class Scheduled:
    """A reusable torch schedule for `count` micro-batches of one shape."""

    stages: Sequence[Stage]
    count: int
    schedule: Any = None
    losses: list[Loss] = field(default_factory=list)  # the loss function of the current run

    def step(self, loss: Loss, *, reduces: bool) -> None:
        """Run forward and backward for the micro-batches that were fed to the stages.

        `loss` receives the index of a micro-batch. With `reduces`, the end reduces gradients over ranks.
        """
        for stage in self.stages:
            stage.reduces = reduces
        self.losses[:] = [loss]
        self.schedule.step(target=torch.arange(self.count), return_outputs=False)

    def loss(self, velocity: Tensor, position: Tensor) -> Tensor:
        """Compute the loss. Torch's schedule calls this on the rank of the last stage."""
        return self.losses[0](velocity, int(position))


def make_schedule(stages: Sequence[Stage], count: int, *, steady: bool) -> Scheduled:
    """Make a 1F1B schedule if `steady`, else GPipe. Several stages per rank are interleaved."""
    scheduled = Scheduled(stages, count)
    settings: dict[str, Any] = {"loss_fn": scheduled.loss, "scale_grads": False}
    several: list[Any] = list(stages)
    if len(stages) > 1:
        kind = ScheduleInterleaved1F1B if steady else ScheduleLoopedBFS
        scheduled.schedule = kind(several, count, **settings)
    else:
        scheduled.schedule = (Schedule1F1B if steady else ScheduleGPipe)(stages[0], count, **settings)
    return scheduled


def make_stage(
    stage: nn.Module,
    number: int,
    split: Split,
    batch: MicroBatch,
    device: torch.device,
    group: dist.ProcessGroup,
) -> Stage:
    """Make stage `number` of `split` for micro-batches with the shape of `batch`."""
    arriving = split.output_like(number - 1, batch) if number else ()
    leaving = split.output_like(number, batch)
    # PipelineStage moves its module to the device, which would undo FSDP2's offload to the host.
    stage.to = lambda *_: stage  # type: ignore[method-assign]
    try:
        return Stage(
            stage, number, split.count, device, input_args=arriving, output_args=leaving, group=group
        )
    finally:
        del stage.to
