"""One training run in both forms: as torch traces or measures it, and as the planner's formula takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, ParamSpec
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.pipeline import Pipeline
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.models.wan.config import PredictorConfig, VaceDitConfig
from mindspeed_mm.ops.stages import MicroBatch
from mindspeed_mm.planning.fit import usual_lora
from mindspeed_mm.planning.memory import Memory, training_memory
from mindspeed_mm.planning.units import TrainingRun
from mindspeed_mm.training.build import build_model
from mindspeed_mm.training.optim import build_optimizer
from tests.support.fake_memory import Traced, make_inputs, step

SIZES = {  # D, F, heads, trunk blocks for each branch block
    "tiny": (128, 512, 2, 2),
    "small": (256, 1024, 4, 2),
    "mid": (512, 2048, 8, 2),
    "1.3B": (1536, 8960, 12, 2),
    "14B": (5120, 13824, 40, 2),
}
BLOCKS = ("blocks.{*}", "vace_blocks.{*}")


@dataclass(frozen=True)
class Case:
    """Settings of one run; `depth` branch blocks."""

    size: str
    recompute: Literal["full", "selective", "none"]
    trainable: Literal["branch", "trunk", "all"]
    shards: int = 1
    cp: int = 1
    lora: int = 0
    depth: int = 1
    quantize: bool = False
    grid: tuple[int, int, int] = (21, 60, 104)
    pp: int = 1
    micro: int = 1  # micro-batches, of a pipeline
    stages: tuple[int, ...] = ()  # trunk blocks of each stage
    dtype: Literal["bf16", "fp32"] = "bf16"  # of products; a CPU without AVX-512 is far slower in bf16

    @property
    def ranks(self) -> int:
        """Of the whole run."""
        return max(self.shards, self.cp) * self.pp

    def __str__(self) -> str:
        lora = f"-lora{self.lora}" if self.lora else ""
        lora += "-int8" * self.quantize
        return f"{self.size}-{self.recompute}-{self.trainable}{lora}-shards{self.shards}-cp{self.cp}"

    @property
    def predictor(self) -> PredictorConfig:
        width, ffn, heads, every = SIZES[self.size]
        return PredictorConfig(
            hidden_size=width,
            ffn_dim=ffn,
            num_heads=heads,
            num_layers=every * self.depth,
            trainable=self.trainable,
            dtype=self.dtype,
            vace_dit=VaceDitConfig(vace_layers=tuple(range(0, every * self.depth, every))),
        )

    @property
    def traced(self) -> Traced:
        """For torch."""
        return Traced(
            predictor=self.predictor,
            grid=self.grid,
            ranks=self.ranks,
            parallel=ParallelConfig(
                context_parallel_size=self.cp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=max(len(self.stages) // self.pp, 1),
            ),
            fsdp=Fsdp2Config(
                sharding_size=self.shards,
                param_dtype=self.dtype,
                recompute_modules=dict.fromkeys(BLOCKS, self.recompute),
                num_to_forward_prefetch=1,
                num_to_backward_prefetch=1,
            ),
            transforms=(
                *((LoraConfig(rank=self.lora),) if self.lora else ()),
                *((QuantizeConfig(),) if self.quantize else ()),
            ),
        )

    def planned(self) -> Memory:
        """By the formula."""
        return training_memory(self.run)

    @property
    def run(self) -> TrainingRun:
        """For the formula."""
        sizes = self.predictor.model
        blocks = [f"blocks.{number}" for number in range(sizes.trunk.num_layers)]
        blocks += [f"vace_blocks.{number}" for number in range(self.depth)]
        run = TrainingRun(
            model=sizes,
            grid=self.grid,
            trainable=self.trainable,
            ranks=self.ranks,
            stages=self.stages,
            pipeline=self.pp,
            micro_batches=self.micro,
            shards=self.shards,
            context_parallel=self.cp,
            recompute={} if self.recompute == "none" else dict.fromkeys(blocks, self.recompute),
            prefetch=1,
            product=4 if self.dtype == "fp32" else 2,
            on_cpu=True,
            text=512,
            quantized=frozenset() if self.quantize else None,
        )
        lora = usual_lora(run, self.lora) if self.lora else {}
        return replace(run, lora=lora)


def measured_memory(case: Case) -> float:
    """Bytes of tensors at the peak of a third step on this rank.

    What stays, and the highest level of torch's allocation events.
    """
    groups.destroy()
    run, accelerator = case.traced, Accelerator.detect("cpu")
    mesh = build_mesh(run.parallel, accelerator, run.fsdp)
    model = build_model(
        run.predictor,
        run.parallel,
        run.fsdp,
        mesh,
        accelerator,
        source=None,
        transforms=run.transforms,
        layers=case.stages,
    )
    optimizer = build_optimizer(model, run.optimizer)
    inputs = [make_inputs(run) for _ in range(case.micro)]
    tensors = [tensor.normal_() for given in inputs for tensor in given.values()]

    def work() -> None:
        if isinstance(model, Pipeline):
            pipeline_step(model, optimizer, inputs)
        else:
            step(model, optimizer, inputs[0])

    for _ in range(2):
        work()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = [
        local(tensor)
        for tensor in [*model.parameters(), *model.buffers(), *moments, *buffers_of(model)]
        if isinstance(tensor, torch.Tensor)
    ]
    stays = sum(tensor.untyped_storage().nbytes() for tensor in [*held, *tensors])
    with unseen_copies(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    lost = sum(event.nbytes() for event in events)
    assert not lost or isinstance(model, Pipeline), "freed where the profiler does not see it"
    levels = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return float(stays + max(levels))


def pipeline_step(
    model: Pipeline, optimizer: torch.optim.Optimizer, inputs: Sequence[Mapping[str, Tensor]]
) -> None:
    """Forward, backward and update of all micro-batches."""
    names = ("latents", "timestep", "prompt_embeds", "vace_context")
    batches = [MicroBatch(*(given[name] for name in names)) for given in inputs]

    def loss(velocity: Tensor, number: int) -> Tensor:
        return (velocity.float() - inputs[number]["target"]).square().mean() / len(inputs)

    model.forward_backward(batches, loss)
    optimizer.step()
    optimizer.zero_grad()


def buffers_of(model: nn.Module) -> list[Tensor]:
    """What a pipeline's schedule keeps for tokens and gradients that arrive."""
    if not isinstance(model, Pipeline):
        return []
    assert model._ready is not None
    stages = model._ready[1].stages
    tables = [table for stage in stages for table in (stage.args_recv_info, stage.grad_recv_info)]
    infos = [info for table in tables for found in table.values() for info in found]
    return [info.buffer for info in infos if getattr(info, "buffer", None) is not None]


_COLLECTIVES = (  # the last two by their names before torch 2.12, too
    "all_gather", "all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single",
    "all_gather_into_tensor", "reduce_scatter_tensor",
)  # fmt: skip
P = ParamSpec("P")


@contextmanager
def unseen_copies() -> Iterator[None]:
    """Collectives work on copies, in a thread that is not profiled.

    gloo's own threads let go of tensors a moment after `wait` returns. The profiler does not see what they
    free, so a measured peak would depend on who is last.
    """
    with ThreadPoolExecutor(1) as thread, ExitStack() as patches:
        for name in _COLLECTIVES:
            if collective := getattr(dist, name, None):
                patches.enter_context(patch.object(dist, name, on_copies(collective, thread)))
        patches.enter_context(patch.object(schedules, "_batch_p2p", send_and_receive(thread)))
        yield


class Exchange:
    """A tensor on its way from stage to stage, by a copy; it is held as torch's own work holds it."""

    def __init__(self, thread: ThreadPoolExecutor, operation: dist.P2POp) -> None:
        self.thread, self.operation = thread, operation
        self.pending: tuple[Tensor, Any] | None = None
        thread.submit(self._start).result()

    def wait(self) -> None:
        """Until it has arrived, or is sent."""
        self.thread.submit(self._end).result()

    def _start(self) -> None:
        made = self.operation
        copy = made.tensor.detach().clone()
        peer = {"group_src" if made.op is dist.irecv else "group_dst": made.group_peer}
        self.pending = copy, made.op(copy, group=made.group, tag=made.tag, **peer)

    def _end(self) -> None:
        assert self.pending is not None
        copy, work = self.pending
        work.wait()
        if self.operation.op is dist.irecv:
            self.operation.tensor.data.copy_(copy)
        self.pending = None


def send_and_receive(thread: ThreadPoolExecutor) -> Callable[..., list[Exchange]]:
    """The same for what stages send each other."""

    def call(operations: Sequence[dist.P2POp], desc: str | None = None) -> list[Exchange]:
        return [Exchange(thread, operation) for operation in operations]

    return call


def on_copies(collective: Callable[P, Any], thread: ThreadPoolExecutor) -> Callable[P, None]:
    """The collective, done when it returns, on copies that another thread makes."""

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        given = [args, kwargs]

        @torch.no_grad()
        def run() -> None:
            positional, named = copies = tree_map_only(Tensor, Tensor.clone, given)
            if (work := collective(*positional, **named)) is not None:
                work.wait()
            for real, copy in zip(tree_leaves(given), tree_leaves(copies), strict=True):
                if isinstance(real, Tensor):
                    real.copy_(copy)

        thread.submit(run).result()

    return call
