"""Pipeline parallelism: each rank holds part of the layers, and micro-batches pass from stage to stage.

The schedules are those of torch.distributed.pipelining. Every rank reads the same micro-batches, so only
tokens and their gradients are sent. Flat stage v·pp + p is virtual chunk v of rank p, as in Megatron.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.distributed.fsdp import set_last_micro_batch
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.ops.stages import MicroBatch, Split

if TYPE_CHECKING:
    from mindspeed_mm.distributed.pipeline_schedule import Scheduled

Loss = Callable[[Tensor, int], Tensor]  # (velocity, index of the micro-batch) → loss


@dataclass(frozen=True)
class WholeModel:
    """The whole model on the meta device, for reference. It is not a submodule of a rank's model."""

    model: nn.Module

    @classmethod
    def copy_of(cls, model: nn.Module) -> WholeModel:
        """Copy a model on the meta device before it is split and gets process groups."""
        return cls(copy.deepcopy(model))


class Pipeline(nn.Module):
    """This rank's stages of a model. A call takes the model's inputs and returns the velocity on every rank.

    A call computes no gradients. Modules and weights have the names of the whole model.
    """

    def __init__(
        self,
        split: Split,
        whole: WholeModel,
        mesh: Mesh,
        schedule: Literal["1f1b", "gpipe"],
        device: torch.device,
    ) -> None:
        super().__init__()
        group = mesh.pp_group
        self.reader = split.reader
        self.stages = nn.ModuleDict({str(number): stage for number, stage in split.stages.items()})
        self.split, self.whole, self.schedule, self.device = split, whole, schedule, device
        self.group, self.data_group = group, mesh.dp_group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._last = (split.count - 1) % self.size  # the rank of the last stage
        self._ready: tuple[object, Scheduled] | None = None  # the most recent shape and its schedule

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this rank's modules by their names in the whole model. Weights are named accordingly."""
        yield prefix, self
        for part in self.parts():
            for name, child in part.named_children():
                full = f"{prefix}.{name}" if prefix else name
                yield from child.named_modules(memo, full, remove_duplicate)

    def parts(self) -> Iterator[nn.Module]:
        """Yield the modules to shard separately: the replicated part and each stage."""
        yield self.reader
        yield from self.stages.values()

    def is_copy(self, name: str) -> bool:
        """Return whether `name` is this rank's copy of a weight that only the first rank saves and counts."""
        return self.rank > 0 and name.split(".")[0] in self.split.shared

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        vace_context: Tensor | None,
        *,
        context_scale: float | Sequence[float] | Tensor = 1.0,
    ) -> Tensor:
        """Run one micro-batch through all stages. Returns the fp32 velocity on every rank."""
        batch = MicroBatch(latents, timestep, prompt_embeds, vace_context, context_scale)
        batch = replace(batch, read=tuple(self.reader(timestep, prompt_embeds)))
        outputs: tuple[Tensor, ...] = ()
        for number in range(self.split.count):
            if number % self.size != self.rank:
                continue
            tokens: tuple[Tensor, ...] = ()
            if number:
                tokens = tuple(_empty(t, self.device) for t in self.split.output_like(number - 1, batch))
                for token in tokens:
                    dist.recv(token, group=self.group, group_src=(number - 1) % self.size)
            stage: Any = self.stages[str(number)]
            stage.feed([batch])
            out = stage(*tokens)
            outputs = out if isinstance(out, tuple) else (out,)
            if number < self.split.count - 1:
                for token in outputs:
                    dist.send(token, group=self.group, group_dst=(number + 1) % self.size)
        shape = self.split.output_like(self.split.count - 1, batch)[0]
        velocity = outputs[0].contiguous() if self.rank == self._last else _empty(shape, self.device)
        dist.broadcast(velocity, group=self.group, group_src=self._last)
        return velocity

    def forward_backward(self, batches: Sequence[MicroBatch], loss: Loss) -> None:
        """Run the forward and backward passes for all micro-batches.

        `loss` is called on the rank of the last stage, with the index in `batches`. Gradients are summed over
        the micro-batches; those of replicated weights are also summed over the pipeline.
        """
        groups = list(self._groups(batches))
        for position, numbers in enumerate(groups, 1):
            self._run([batches[number] for number in numbers], numbers, loss, last=position == len(groups))
        self._sum_copies()

    def norm(self, local_norm: Callable[[list[Tensor]], float]) -> float:
        """Return the global gradient norm of all stages on all ranks, given a function for this rank's."""
        named = self.named_parameters()
        mine = local_norm([p.grad for name, p in named if p.grad is not None and not self.is_copy(name)])
        return math.sqrt(sum(value**2 for value in self._gather(mine)))

    def broadcast_from_last(self, values: Tensor) -> Tensor:
        """Broadcast `values` from the rank of the last stage to all ranks of the pipeline."""
        dist.broadcast(values, group=self.group, group_src=self._last)
        return values

    def _groups(self, batches: Sequence[MicroBatch]) -> Iterator[list[int]]:
        """Yield the micro-batch indices of each schedule run.

        A group has one shape and a size that the schedule accepts. All data-parallel ranks form the same
        groups, because FSDP2 gathers weights in the order of the schedule. Each rank sorts by shape;
        positions with equal shapes on every rank then form a group.
        """
        order = sorted(range(len(batches)), key=lambda number: batches[number].shape)
        shapes = [zlib.crc32(repr(batches[number].shape).encode()) for number in order]
        mine = torch.tensor(shapes, dtype=torch.int64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.data_group))]
        dist.all_gather(every, mine, group=self.data_group)
        multiple = self.size if len(self.stages) > 1 else 1
        for positions in group_positions(torch.stack(every).tolist(), multiple):
            yield [order[position] for position in positions]

    def _run(self, batches: list[MicroBatch], numbers: list[int], loss: Loss, *, last: bool) -> None:
        read_states = [tuple(self.reader(batch.timestep, batch.prompt_embeds)) for batch in batches]
        # Leaves, because several stages of this rank read them and each runs its own backward.
        leaves = [tuple(t.detach().requires_grad_(t.requires_grad) for t in states) for states in read_states]
        inputs = [replace(batch, read=copies) for batch, copies in zip(batches, leaves, strict=True)]
        for stage in self.stages.values():
            feeding: Any = stage
            feeding.feed(inputs)
        self._schedule(inputs[0], len(inputs)).step(
            lambda velocity, position: loss(velocity, numbers[position]), reduces=last
        )
        for position, (states, copies) in enumerate(zip(read_states, leaves, strict=True)):
            set_last_micro_batch(self.reader, last and position == len(read_states) - 1)
            pairs = [(a, r.grad) for a, r in zip(states, copies, strict=True) if r.grad is not None]
            if pairs:
                torch.autograd.backward([a for a, _ in pairs], [g for _, g in pairs])

    def _schedule(self, batch: MicroBatch, count: int) -> Scheduled:
        """Return the schedule for this shape. Only the last one is cached, because it holds buffers."""
        # Imports torch._dynamo, which is slow and not needed without a pipeline.
        from mindspeed_mm.distributed.pipeline_schedule import make_schedule, make_stage

        key = (batch.shape, count)
        if self._ready is None or self._ready[0] != key:
            self._ready = None
            stages = [
                make_stage(stage, int(number), self.split, batch, self.device, self.group)
                for number, stage in self.stages.items()
            ]
            steady = self.schedule == "1f1b" and count >= self.size
            self._ready = (key, make_schedule(stages, count, steady=steady))
        return self._ready[1]

    @torch.no_grad()
    def _sum_copies(self) -> None:
        """Sum the gradients of replicated weights, to which the blocks of every rank contribute."""
        gradients = []
        for parameter in self.reader.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad = parameter.grad
                gradients.append(grad.to_local() if isinstance(grad, DTensor) else grad)
        for gradient in gradients:
            dist.all_reduce(gradient, group=self.group)

    def _gather(self, value: float) -> list[float]:
        mine = torch.tensor([value], dtype=torch.float32, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [float(other) for other in found]


def group_positions(shapes: Sequence[Sequence[int]], multiple: int) -> Iterator[list[int]]:
    """Yield the groups of positions that one schedule runs, the same on every rank.

    `shapes` holds the shape at each position, for each rank. Interleaved schedules accept multiples of
    `multiple`; the remainder forms its own group.
    """
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, column in enumerate(zip(*shapes, strict=True)):
        alike[column].append(position)
    for positions in alike.values():
        whole = len(positions) - len(positions) % multiple if len(positions) > multiple else len(positions)
        yield positions[:whole]
        if positions[whole:]:
            yield positions[whole:]


def whole_model(model: nn.Module) -> nn.Module:
    """Return the whole model for names, shapes and `requires_grad`.

    For a Pipeline, its parameters are on the meta device.
    """
    return model.whole.model if isinstance(model, Pipeline) else model


def whole_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Map the name of every weight to its shape, including weights on other ranks."""
    return {name: parameter.shape for name, parameter in whole_model(model).named_parameters()}


def own_names(model: nn.Module) -> list[str]:
    """Return the names of the weights that this rank saves, without copies of another rank's weights."""
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not (isinstance(model, Pipeline) and model.is_copy(name))]


def _empty(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)
