"""Builds the Trainer of a PretrainJob: model, optimizer, data, checkpoints and hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from megatron.mm.schedules import num_micro_batches, param_scheduler
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.loader import TrainLoader
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.mesh import build_mesh
from mindspeed_mm.distributed.patterns import recompute_plan
from mindspeed_mm.distributed.pipeline import whole_model
from mindspeed_mm.distributed.rng import seed_everything
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.flow.schedule import Schedule, build_schedule
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.finite import check_weights
from mindspeed_mm.models.initial_weights import open_initial_weights
from mindspeed_mm.models.lora.fused import write_fused
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.transforms.config import QuantizeConfig
from mindspeed_mm.models.transforms.fuse import open_fused
from mindspeed_mm.models.transforms.lora import lora_sizes
from mindspeed_mm.models.wan.flops import Flops
from mindspeed_mm.models.wan.stages import even_layers, stage_layers
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.training_data import build_loader
from mindspeed_mm.tasks.training_hooks import build_hooks
from mindspeed_mm.training.build import build_model
from mindspeed_mm.training.checkpoint import Checkpointer
from mindspeed_mm.training.checkpoint_checks import BaseReference
from mindspeed_mm.training.optim import build_optimizer
from mindspeed_mm.training.raw_clips import RawBatches
from mindspeed_mm.training.state import TrainState
from mindspeed_mm.training.step import StepSettings, TaskSettings
from mindspeed_mm.training.trainer import TrainData, Trainer

logger = get_logger(__name__)


def assemble(job: PretrainJob, accelerator: Accelerator) -> Trainer:
    """Build the Trainer. Must run inside a process group. Raises MindSpeedMMError if parts do not fit."""
    training, batch = job.training, job.training.batch
    train_iters, global_batch_size = batch.train_iters or 0, batch.global_batch_size or 0
    mesh = build_mesh(job.parallel, accelerator, job.fsdp2)
    schedule = build_schedule(job.model.diffusion)
    loader = build_loader(job, mesh, accelerator)
    start = open_initial_weights(job.predictor)
    if start.weights is not None:
        logger.info(start.weights.description)
    model = build_model(
        job.predictor,
        job.parallel,
        job.fsdp2,
        mesh,
        accelerator,
        source=start.weights,
        seed=batch.seed,
        transforms=job.model.transforms,
        layers=layers_of_stages(job, start.weights),
    )
    optimizer = build_optimizer(model, training.optimizer)
    scheduler = param_scheduler(
        optimizer, training.optimizer, train_iters=train_iters, global_batch_size=global_batch_size
    )
    seed_everything(batch.seed, mesh.rank)  # for dropout; loading a checkpoint restores its RNG state
    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler)
    # Checkpoints of an adapter refer to its base model, or include it if no single source has all of it.
    adapts = any(not isinstance(config, QuantizeConfig) for config in job.model.transforms)
    is_whole = not adapts or start.base is start.weights
    if not is_whole:
        logger.info("checkpoints include the frozen weights, because no single source has all of them")
    checkpoints = build_checkpoints(job, start.base if is_whole else None, accelerator)
    if checkpoints.load(state):  # frozen weights were already checked on loading
        trained = {name: local(weight) for name, weight in model.named_parameters() if weight.requires_grad}
        raise_on_all_ranks(lambda: check_weights(f"--load {training.checkpoint.load}", trained))
    return Trainer(
        training,
        state,
        step_settings(job, schedule, task_settings(job, loader)),
        TrainData(
            batches=loader.batches(state.consumed_samples),
            cost=sample_cost(job, model),
            dp_size=mesh.dp_size,
            tasks=loader.tasks,
            seconds=loader.costs.take if isinstance(loader, RawBatches) else dict,
        ),
        build_hooks(job, model, schedule, mesh, accelerator, state.iteration),
        accelerator=accelerator,
        checkpoints=checkpoints if training.checkpoint.save else None,
    )


def layers_of_stages(job: PretrainJob, weights: WeightsSource | None) -> list[int]:
    """Return the number of trunk blocks of each stage.

    The model JSON takes precedence, then the split of the weights. By default, the split is even.
    """
    count = job.parallel.num_stages
    if count == 1:
        return []  # a model from another package might not have num_layers
    total = job.predictor.num_layers
    if job.predictor.pipeline_num_layers is not None:
        key = "predictor.pipeline_num_layers"
        return stage_layers(job.predictor.pipeline_num_layers, total, count, key)
    if weights is not None and len(weights.stage_layers) == count:
        return list(weights.stage_layers)
    return even_layers(total, count)


def build_checkpoints(job: PretrainJob, rest: WeightsSource | None, accelerator: Accelerator) -> Checkpointer:
    """Build the job's Checkpointer. Checkpoints refer to `rest` for the frozen weights."""
    key_map = MODELS.get(job.predictor.model_id).key_map("mm")
    base = None
    if rest is not None:
        loras = write_fused(open_fused(job.model.transforms, rest.shapes))
        base = BaseReference(str(rest.path), rest.fingerprint(), rest.dialect, loras)
    return Checkpointer(job.training.checkpoint, accelerator, key_map, base=base, job_json=job.to_json())


def step_settings(job: PretrainJob, schedule: Schedule, tasks: Mapping[str, TaskSettings]) -> StepSettings:
    """Return the settings of a training step. Computes the number of micro-batches as Megatron does."""
    batch = job.training.batch
    return StepSettings(
        micro_batches=num_micro_batches(batch.micro_batch_size, batch.global_batch_size or 0, job.dp_size),
        schedule=schedule,
        seed=batch.seed,
        exclude_refs=job.model.diffusion.ref_loss == "exclude",
        clip_grad=job.training.optimizer.clip_grad,
        tasks=tasks,
    )


def task_settings(job: PretrainJob, loader: TrainLoader | RawBatches) -> Mapping[str, TaskSettings]:
    """Return the settings of the recipe's tasks that set their own shift or loss weight."""
    recipe = loader.stream.recipe if isinstance(loader, RawBatches) else None
    diffusion = job.model.diffusion
    return {
        name: TaskSettings(
            schedule=build_schedule(
                diffusion if entry.shift is None else diffusion.model_copy(update={"shift": entry.shift})
            ),
            loss_weight=entry.loss_weight,
        )
        for name, entry in (recipe.tasks.items() if recipe else ())
        if entry.shift is not None or entry.loss_weight != 1
    }


def sample_cost(job: PretrainJob, model: nn.Module) -> Callable[[tuple[int, ...]], tuple[int, Flops]]:
    """Return a function from (R+F, h, w, text rows) to the tokens and FLOPs of one sample.

    The function returns zeros if the model's spec has no `cost`.
    """
    spec = MODELS.get(job.predictor.model_id)
    if not spec.cost:
        return lambda size: (0, Flops(0.0, 0.0))
    whole = whole_model(model)
    names = [name for name, _ in whole.named_modules() if name]
    plan = recompute_plan(names, spec.units, job.fsdp2, job.parallel)
    return spec.sample_cost(job.predictor, plan, lora_sizes(whole))
