"""The interface between a model that is split into pipeline stages and the schedule that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of a model for one micro-batch, as every rank of a pipeline has them."""

    latents: Tensor  # [B, 16, R+F, h, w]
    timestep: Tensor  # [B] fp32
    prompt_embeds: Tensor  # [B, L, text_dim]
    vace_context: Tensor | None  # [B, 96, R+F, h, w]
    context_scale: float | Sequence[float] | Tensor = 1.0
    read: tuple[Tensor, ...] = ()  # the result of `Split.reader` for this micro-batch

    @property
    def shape(self) -> tuple[object, ...]:
        """The sizes that determine the shapes of the tensors sent between stages."""
        return (tuple(self.latents.shape), self.vace_context is None)


@dataclass(frozen=True)
class Split:
    """The parts of a model that one rank of a pipeline holds."""

    reader: nn.Module  # (timestep, prompt_embeds) → MicroBatch.read, on every rank
    stages: Mapping[int, nn.Module]  # number → stage; call `feed(micro_batches)` first
    count: int  # stages of all ranks
    output_like: Callable[
        [int, MicroBatch], tuple[Tensor, ...]
    ]  # (stage, batch) → meta tensors with the shapes of its output
    shared: tuple[str, ...]  # first name components of the reader's weights
