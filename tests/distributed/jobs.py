"""What the ranks of these tests run: a few training steps on a tiny model, described by plain settings."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from megatron.mm.schedules import param_scheduler
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.fsdp import set_last_micro_batch
from mindspeed_mm.distributed.mesh import Mesh, build_mesh
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.config import BRANCH, PredictorConfig, VaceDitConfig
from mindspeed_mm.models.wan.state_dict import KEY_MAPS
from mindspeed_mm.training.build import build_model
from mindspeed_mm.training.checkpoint import Checkpointer
from mindspeed_mm.training.checkpoint_checks import BaseReference
from mindspeed_mm.training.config import CheckpointConfig, OptimizerConfig
from mindspeed_mm.training.optim import build_optimizer
from mindspeed_mm.training.state import TrainState
from tests.support.tiny import TINY, tiny_inputs, tiny_transformer

CPU = Accelerator.detect("cpu")


def predictor(**changes: Any) -> PredictorConfig:
    """TINY as the model JSON says it, fp32."""
    values = {
        **TINY.trunk.model_dump(),
        "dtype": "fp32",
        "vace_dit": VaceDitConfig(vace_layers=TINY.vace_layers),
    }
    return PredictorConfig(**{**values, **changes})


class FromModule:
    """The weights of a whole model as a source: what open_weights answers, without files."""

    def __init__(self, module: nn.Module) -> None:
        self.state = module.state_dict()
        self.shapes = {name: weight.shape for name, weight in self.state.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.state[name]


@dataclass
class Setup:
    """One run's settings, and what they build."""

    trainable: str = "branch"
    dtype: str = "fp32"
    cp: int = 1
    fsdp: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    optimizer: str = "adam"

    def build(self) -> tuple[nn.Module, Mesh]:
        fsdp = Fsdp2Config(**{"param_dtype": self.dtype, **self.fsdp})
        parallel = ParallelConfig(context_parallel_size=self.cp, **self.parallel)
        mesh = build_mesh(parallel, CPU, fsdp)
        source = FromModule(tiny_transformer(self.seed))
        part = predictor(trainable=self.trainable, dtype=self.dtype)
        return build_model(part, parallel, fsdp, mesh, CPU, source=source), mesh


GRID = {"frames": 3, "height": 6, "width": 10}  # 45 tokens: no multiple of 2 or 4


def sample(index: int, grid: dict[str, int] = GRID) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and target number `index`: the same on every rank."""
    inputs = tiny_inputs(index, **grid)
    target = torch.randn(inputs["latents"].shape, generator=torch.Generator().manual_seed(1000 + index))
    return inputs, target


def optimizer(model: nn.Module, lr: float = 1e-2, name: str = "adam") -> torch.optim.Optimizer:
    return build_optimizer(model, OptimizerConfig(lr=lr, optimizer=name))


def step(
    model: nn.Module, mesh: Mesh, optim: torch.optim.Optimizer, iteration: int, batch: int, grid=GRID
) -> float:
    """Run one iteration over `batch` samples, split over the data-parallel ranks. Return the global loss."""
    share = batch // mesh.dp_size
    total = torch.zeros(())
    for number in range(share):
        set_last_micro_batch(model, number == share - 1)
        inputs, target = sample(iteration * batch + mesh.dp_rank * share + number, grid)
        loss = (model(**inputs) - target).square().mean()
        (loss / share).backward()
        total += loss.detach() / share
    optim.step()
    optim.zero_grad()
    dist.all_reduce(total)
    return float(total / dist.get_world_size())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def train(setup: Setup, steps: int, batch: int = 4, grid=GRID) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses and final weights on rank 0, and {} on the other ranks."""
    model, mesh = setup.build()
    optim = optimizer(model, name=setup.optimizer)
    losses = [step(model, mesh, optim, iteration, batch, grid) for iteration in range(steps)]
    final = weights(model)
    return losses, final if mesh.rank == 0 else {}


def gradients(setup: Setup, grid: dict[str, int] = GRID) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one sample that all ranks share."""
    model, mesh = setup.build()
    inputs, target = sample(0, grid)
    loss = (model(**inputs) - target).square().mean()
    loss.backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), found if mesh.rank == 0 else {}


def plain(
    steps: int, batch: int = 4, trainable: str = "branch", grid=GRID, name: str = "adam"
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without any sharding: one module, one process."""
    from mindspeed_mm.models.transforms.match import is_trainable

    model = tiny_transformer(0).train()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(key, trainable, BRANCH))
    optim = optimizer(model, name=name)
    losses = []
    for iteration in range(steps):
        total = 0.0
        for number in range(batch):
            inputs, target = sample(iteration * batch + number, grid)
            loss = (model(**inputs) - target).square().mean()
            (loss / batch).backward()
            total += float(loss.detach()) / batch
        optim.step()
        optim.zero_grad()
        losses.append(total)
    return losses, weights(model)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@dataclass
class Run:
    """A training run with checkpoints in `folder`, as tasks.pretrain makes it."""

    folder: Path
    setup: Setup = field(default_factory=Setup)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    base: str | None = (
        "0123"  # fingerprint: checkpoints of what trains, which name where the rest lies; None: of all
    )

    def start(self) -> tuple[TrainState, Mesh, Checkpointer]:
        model, mesh = self.setup.build()
        config = OptimizerConfig(
            lr=1e-2, lr_decay_style="cosine", lr_warmup_iters=2, optimizer=self.setup.optimizer
        )
        optim = build_optimizer(model, config)
        scheduler = param_scheduler(optim, config, train_iters=10, global_batch_size=4)
        state = TrainState(model=model, optimizer=optim, scheduler=scheduler)
        settings = CheckpointConfig(**{"save": str(self.folder), "load": str(self.folder), **self.checkpoint})
        base = BaseReference("/somewhere/base", self.base, "official") if self.base else None
        points = Checkpointer(settings, CPU, KEY_MAPS["mm"], base=base, job_json='{"a": 1}')
        return state, mesh, points


def train_to(
    run: Run,
    end: int,
    save_at: tuple[int, ...] = (),
    die_in_save_at: int | None = None,
    *,
    tensors: bool = True,
) -> dict[str, Any]:
    """Load the checkpoint if there is one, train to iteration `end`, and save at some iterations.

    Return losses by iteration, and with `tensors` also weights and moments.
    """
    torch.manual_seed(5)
    state, mesh, points = run.start()
    points.load(state)
    losses = {}
    while state.iteration < end:
        losses[state.iteration] = step(state.model, mesh, state.optimizer, state.iteration, 4)
        state.scheduler.step(4)
        torch.rand(3)  # a model with dropout would move the generator
        state.iteration += 1
        state.consumed_samples += 4
        state.skips.total = state.iteration
        state.loss_means[0] = (state.iteration, losses[state.iteration - 1])
        points.poll()
        if state.iteration == die_in_save_at:
            FileSystemWriter.write_data = _die
        if state.iteration in (*save_at, die_in_save_at):
            points.save(state)
    points.wait()
    answer: dict[str, Any] = {"losses": losses, "consumed": state.consumed_samples}
    if tensors:
        answer["weights"] = weights(state.model)
        answer["moments"] = {
            name: {key: whole(value) for key, value in state.optimizer.state[parameter].items()}
            for name, parameter in state.model.named_parameters()
            if parameter in state.optimizer.state
        }
    answer["loss_means"] = dict(state.loss_means)
    answer["skipped"] = state.skips.total
    return {**answer, "lr": state.optimizer.param_groups[0]["lr"], "rng": torch.get_rng_state()}


def die_between_renames(run: Run) -> None:
    """Save the loaded iteration once more, killed between moving the old folder away and the new one in."""
    state, _, points = run.start()
    points.load(state)
    rename = Path.rename

    def rename_or_die(self: Path, target: Path) -> Path:
        return _die() if self.name == f".writing-iter_{state.iteration:07d}" else rename(self, target)

    Path.rename = rename_or_die
    points.save(state)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def load_error(run: Run) -> str:
    """What loading says; empty when it works."""
    state, _, points = run.start()
    try:
        points.load(state)
    except WeightsError as error:
        return str(error)
    return ""
