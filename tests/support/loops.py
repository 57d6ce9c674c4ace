"""A training loop on tiny models and features in memory, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.mm.schedules import param_scheduler
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.config import LoaderConfig
from mindspeed_mm.data.loader import Collate, TrainLoader
from mindspeed_mm.data.sample import FeatureRecord
from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.flow.schedule import build_schedule
from mindspeed_mm.models.wan.flops import Flops, step_flops, tokens_of
from mindspeed_mm.training.config import TrainingConfig
from mindspeed_mm.training.hooks.base import Hook
from mindspeed_mm.training.hooks.best_checkpoint import BestCheckpoint
from mindspeed_mm.training.hooks.evaluation import Evaluation
from mindspeed_mm.training.hooks.finite_guard import FiniteGuard
from mindspeed_mm.training.hooks.log_line import LogLine
from mindspeed_mm.training.hooks.metric_writers import MetricWriter, MetricWriters
from mindspeed_mm.training.hooks.observer import Observer
from mindspeed_mm.training.hooks.samples import Samples
from mindspeed_mm.training.hooks.spikes import Spikes
from mindspeed_mm.training.optim import build_optimizer
from mindspeed_mm.training.state import TrainState
from mindspeed_mm.training.step import StepSettings
from mindspeed_mm.training.trainer import Saver, TrainData, Trainer
from tests.support.tiny import TINY

CPU = Accelerator(kind="cpu", device=torch.device("cpu"), backend="gloo")


@dataclass
class Recorder:
    """A writer that stores its input."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    closed: bool = False

    def write(self, iteration: int, values: dict[str, float]) -> None:
        self.rows.append((iteration, values))

    def close(self) -> None:
        self.closed = True


class Records(list[FeatureRecord]):
    """Features in memory, asked like a dataset."""

    def shape(self, index: int) -> tuple[int, ...]:
        return (*self[index].latents.shape, self[index].num_refs)


def random_records(
    count: int, grids: tuple[tuple[int, int, int], ...] = ((3, 4, 6),), captions: int = 1
) -> Records:
    """`count` random features; their shapes take turns."""
    generator = torch.Generator().manual_seed(99)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Records(
        FeatureRecord(
            latents=normal(16, *grids[i % len(grids)]),
            vace_context=normal(96, *grids[i % len(grids)]),
            prompt_embeds=tuple(normal(5 + c, TINY.trunk.text_dim) for c in range(captions)),
            num_refs=0,
            key=f"clip{i}",
        )
        for i in range(count)
    )


def training(**parts: dict[str, Any]) -> TrainingConfig:
    """A TrainingConfig with a constant rate of 1e-3 and a log line for each iteration; parts override."""
    base: dict[str, dict[str, Any]] = {
        "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        "batch": {"global_batch_size": 2, "train_iters": 3, "num_workers": 0, "seed": 7},
        "log": {"log_interval": 1},
    }
    return TrainingConfig.model_validate(
        {name: {**base.get(name, {}), **parts.get(name, {})} for name in {*base, *parts}}
    )


def trainer(
    model: torch.nn.Module,
    config: TrainingConfig,
    records: Records | None = None,
    *,
    diffusion: ScheduleConfig | None = None,
    collate: Collate | None = None,
    batches: Any = None,
    tasks: tuple[str, ...] = (),
    writers: Sequence[MetricWriter] = (),
    observe: Callable[[int], None] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    videos: Callable[[int], dict[str, float]] | None = None,
    checkpoints: Saver | None = None,
    peak_tflops: float | None = None,
    hooks: Sequence[Hook] = (),
) -> Trainer:
    """A one-process Trainer over `records` with the built-in hooks, then `hooks`."""
    batch = config.batch
    optimizer = build_optimizer(model, config.optimizer)
    scheduler = param_scheduler(
        optimizer,
        config.optimizer,
        train_iters=batch.train_iters or 1,
        global_batch_size=batch.global_batch_size or 1,
    )
    loader = TrainLoader(
        records if records is not None else random_records(4),
        LoaderConfig(shuffle=True),
        collate or Collate(seed=batch.seed),
        micro_batch_size=batch.micro_batch_size,
        seed=batch.seed,
    )
    built_in = [
        FiniteGuard(),
        Spikes(),
        *([Observer(observe)] if observe else []),
        MetricWriters(writers, peak_tflops),
        LogLine(peak_tflops),
        *([Evaluation(evaluate)] if evaluate else []),
        *([BestCheckpoint()] if config.checkpoint.save_best else []),
        *([Samples(videos)] if videos else []),
    ]
    return Trainer(
        config,
        TrainState(model=model, optimizer=optimizer, scheduler=scheduler),
        StepSettings(
            micro_batches=(batch.global_batch_size or 1) // batch.micro_batch_size,
            schedule=build_schedule(diffusion or ScheduleConfig()),
            seed=batch.seed,
            exclude_refs=False,
            clip_grad=config.optimizer.clip_grad,
        ),
        TrainData(batches=loader.batches() if batches is None else batches, cost=_cost, tasks=tasks),
        [*built_in, *hooks],
        accelerator=CPU,
        checkpoints=checkpoints,
    )


def _cost(size: tuple[int, ...]) -> tuple[int, Flops]:
    return tokens_of(size[:3], TINY), step_flops(TINY, tokens_of(size[:3], TINY), "all")
