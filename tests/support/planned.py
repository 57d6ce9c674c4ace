"""One training run in both forms: as torch traces or measures it, and as the planner's formula takes it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.mm import groups
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.models.transforms.config import LoraConfig, QuantizeConfig
from mindspeed_mm.models.wan.config import PredictorConfig, VaceDitConfig
from mindspeed_mm.planning.fit import usual_lora
from mindspeed_mm.planning.memory import Memory, training_memory
from mindspeed_mm.planning.units import TrainingRun
from mindspeed_mm.training.build import build_model
from mindspeed_mm.training.optim import build_optimizer
from tests.support.fake_memory import Traced, make_inputs, step

SIZES = {  # D, F, heads, trunk blocks for each branch block
    "small": (256, 1024, 4, 2),
    "mid": (512, 2048, 8, 2),
    "1.3B": (1536, 8960, 12, 2),
    "14B": (5120, 13824, 40, 5),
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
            vace_dit=VaceDitConfig(vace_layers=tuple(range(0, every * self.depth, every))),
        )

    @property
    def traced(self) -> Traced:
        """For torch."""
        return Traced(
            predictor=self.predictor,
            grid=self.grid,
            ranks=max(self.shards, self.cp),
            parallel=ParallelConfig(context_parallel_size=self.cp),
            fsdp=Fsdp2Config(
                sharding_size=self.shards,
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
        sizes = self.predictor.model
        blocks = [f"blocks.{number}" for number in range(sizes.trunk.num_layers)]
        blocks += [f"vace_blocks.{number}" for number in range(self.depth)]
        run = TrainingRun(
            model=sizes,
            grid=self.grid,
            trainable=self.trainable,
            ranks=max(self.shards, self.cp),
            shards=self.shards,
            context_parallel=self.cp,
            recompute={} if self.recompute == "none" else dict.fromkeys(blocks, self.recompute),
            prefetch=1,
            on_cpu=True,
            text=512,
            quantized=frozenset() if self.quantize else None,
        )
        lora = usual_lora(run, self.lora) if self.lora else {}
        return training_memory(TrainingRun(**{**vars(run), "lora": lora}))


def measured_memory(case: Case) -> float:
    """Bytes of tensors at the peak of a third step on this rank.

    What stays, and the highest level of torch's allocation events.
    """
    groups.destroy()
    run, accelerator = case.traced, Accelerator.detect("cpu")
    mesh = build_mesh(run.parallel, accelerator, run.fsdp)
    model = build_model(
        run.predictor, run.parallel, run.fsdp, mesh, accelerator, source=None, transforms=run.transforms
    )
    optimizer = build_optimizer(model, run.optimizer)
    inputs = make_inputs(run)
    for tensor in inputs.values():
        tensor.normal_()
    for _ in range(2):
        step(model, optimizer, inputs)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held = [
        local(tensor)
        for tensor in [*model.parameters(), *model.buffers(), *moments]
        if isinstance(tensor, torch.Tensor)
    ]
    stays = sum(tensor.untyped_storage().nbytes() for tensor in [*held, *inputs.values()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(model, optimizer, inputs)
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    levels = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return float(stays + max(levels))
