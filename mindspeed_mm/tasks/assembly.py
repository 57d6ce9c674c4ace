"""From a PretrainJob to the parts of its loop: model, optimizer, data, checkpoints, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron.mm.schedules import num_micro_batches, param_scheduler
from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.conditioning.recipe import read_recipe
from mindspeed_mm.data.config import FeatureDatasetConfig
from mindspeed_mm.data.loader import Collate, TrainLoader
from mindspeed_mm.data.registry import DATASETS
from mindspeed_mm.data.threads import map_in_threads
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.mesh import Mesh, build_mesh
from mindspeed_mm.distributed.patterns import recompute_plan
from mindspeed_mm.distributed.pipeline import whole_model
from mindspeed_mm.distributed.rng import seed_everything
from mindspeed_mm.distributed.shards import local
from mindspeed_mm.errors import DataError
from mindspeed_mm.evaluation.stats import mean_of
from mindspeed_mm.files import write_text
from mindspeed_mm.flow.schedule import Schedule, build_schedule
from mindspeed_mm.log import get_logger, rank, world_size
from mindspeed_mm.models.finite import check_weights
from mindspeed_mm.models.lora.fused import write_fused
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.spec import MODELS
from mindspeed_mm.models.start import start_of
from mindspeed_mm.models.transforms.config import QuantizeConfig
from mindspeed_mm.models.transforms.fuse import open_fused
from mindspeed_mm.models.transforms.lora import lora_sizes
from mindspeed_mm.models.wan.flops import Flops, peak_tflops
from mindspeed_mm.models.wan.stages import even_layers, stage_layers
from mindspeed_mm.registry import resolve
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.raw_training import build_raw_batches
from mindspeed_mm.tools.profiler import build_observer
from mindspeed_mm.training.build import build_model
from mindspeed_mm.training.checkpoint import Checkpointer
from mindspeed_mm.training.checkpoint_checks import BaseReference
from mindspeed_mm.training.checkpoint_folder import Best, read_best
from mindspeed_mm.training.loop import LoopParts
from mindspeed_mm.training.metric_writers import Writer, open_writers
from mindspeed_mm.training.optim import build_optimizer
from mindspeed_mm.training.raw_clips import RawBatches
from mindspeed_mm.training.state import TrainState
from mindspeed_mm.training.step import StepSettings, TaskSettings
from mindspeed_mm.training.validation import held_out_loss

logger = get_logger(__name__)


def assemble(job: PretrainJob, accelerator: Accelerator) -> LoopParts:
    """Build everything. Inside a process group; raises the package's errors on what does not fit."""
    training, batch = job.training, job.training.batch
    train_iters, global_batch_size = batch.train_iters or 0, batch.global_batch_size or 0
    mesh = build_mesh(job.parallel, accelerator, job.fsdp2)
    schedule = build_schedule(job.model.diffusion)
    loader = build_loader(job, mesh, accelerator)
    start = start_of(job.predictor)
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
    seed_everything(batch.seed, mesh.rank)  # before a checkpoint restores its own: dropout draws from here
    state = TrainState(model=model, optimizer=optimizer, scheduler=scheduler)
    # an adapter's base is the whole model: where no one place holds that, checkpoints hold it
    adapts = any(not isinstance(config, QuantizeConfig) for config in job.model.transforms)
    is_whole = not adapts or start.base is start.weights
    if not is_whole:
        logger.info("checkpoints hold the frozen weights, too: no one place has them all")
    checkpoints = build_checkpoints(job, start.base if is_whole else None, accelerator)
    if checkpoints.load(state):  # what does not train was looked at when it was filled
        trained = {name: local(weight) for name, weight in model.named_parameters() if weight.requires_grad}
        raise_on_all_ranks(lambda: check_weights(f"--load {training.checkpoint.load}", trained))
    return LoopParts(
        state=state,
        batches=loader.batches(state.consumed_samples),
        schedule=schedule,
        step=replace(step_settings(job), tasks=task_settings(job, loader)),
        dp_size=mesh.dp_size,
        cost=sample_cost(job, model),
        checkpoints=checkpoints if training.checkpoint.save else None,
        evaluate=build_evaluation(job, model, schedule, mesh, accelerator),
        writers=job_writers(job, mesh, state.iteration),
        observe=build_observer(job.tools, training.profile, accelerator.device, mesh.rank),
        accelerator=accelerator,
        peak_tflops=training.log.peak_tflops or peak_tflops(accelerator.device_name(), job.predictor.dtype),
        videos=build_videos(job, model, mesh, accelerator),
        best=best_so_far(job, state.iteration),
        tasks=loader.tasks,
        costs=loader.costs.take if isinstance(loader, RawBatches) else None,
    )


def layers_of_stages(job: PretrainJob, weights: WeightsSource | None) -> list[int]:
    """Trunk blocks of each stage: as the model JSON says, else as the weights are split, else even."""
    count = job.parallel.num_stages
    if count == 1:
        return []  # a model of another package may have no layers
    total = job.predictor.num_layers
    if job.predictor.pipeline_num_layers is not None:
        key = "predictor.pipeline_num_layers"
        return stage_layers(job.predictor.pipeline_num_layers, total, count, key)
    if weights is not None and len(weights.stage_layers) == count:
        return list(weights.stage_layers)
    return even_layers(total, count)


def build_checkpoints(job: PretrainJob, rest: WeightsSource | None, accelerator: Accelerator) -> Checkpointer:
    """Checkpoints of this job; what does not train is named by reference to `rest`."""
    key_map = resolve(MODELS.get(job.predictor.model_id).key_maps)["mm"]
    base = None
    if rest is not None:
        loras = write_fused(open_fused(job.model.transforms, rest.shapes))
        base = BaseReference(str(rest.path), rest.fingerprint(), rest.dialect, loras)
    return Checkpointer(job.training.checkpoint, accelerator, key_map, base=base, job_json=job.to_json())


def open_dataset(kind: str, config: Any, job: PretrainJob) -> Any:
    """A dataset of the job, held out or not; checksums as --no-verify-checksums says."""
    if job.training.checkpoint.no_verify_checksums and hasattr(config, "verify_checksums"):
        config = config.model_copy(update={"verify_checksums": False})
    return resolve(DATASETS.get(kind).build)(config)


def build_loader(job: PretrainJob, mesh: Mesh, accelerator: Accelerator) -> TrainLoader | RawBatches:
    """This rank's micro-batches. Raises DataError for features that do not fit the model."""
    if job.raw_clips is not None:
        return build_raw_batches(job, job.raw_clips, mesh, accelerator)
    batch = job.training.batch
    dataset = open_dataset(job.data.dataset_type, job.data.dataset_param, job)
    check_features(dataset, job)
    collate = Collate(
        seed=batch.seed,
        caption_dropout=job.model.caption_dropout,
        null_prompt=getattr(dataset, "null_prompt", None) if job.model.caption_dropout else None,
        with_context=job.predictor.reads_context,
    )
    return TrainLoader(
        dataset,
        job.data.dataloader_param,
        collate,
        micro_batch_size=batch.micro_batch_size,
        seed=batch.seed,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        num_workers=batch.num_workers,
        pin_memory=accelerator.kind != "cpu",
    )


def check_features(dataset: Any, job: PretrainJob) -> None:
    """Look at the header of every feature, each rank at its share.

    Raises the first DataError of any rank on all of them.

    A dataset of another package is looked at where it has `check` and `check_null_prompt` as FeatureDataset
    has.
    """
    look = getattr(dataset, "check", None)
    if look is None:
        return
    text_dim, text_len = getattr(job.predictor, "text_dim", None), getattr(job.predictor, "text_len", None)
    if job.model.caption_dropout and text_dim is not None and hasattr(dataset, "check_null_prompt"):
        dataset.check_null_prompt(text_dim, text_len)

    def failure(index: int) -> DataError | None:
        try:
            look(index, text_dim=text_dim, text_len=text_len)
        except DataError as error:
            return error
        return None

    found_here = map_in_threads(failure, range(rank(), len(dataset), world_size()))
    first = next((error for error in found_here if error is not None), None)
    found = [first]
    if dist.is_initialized() and world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, first)
    for error in found:
        if error is not None:
            raise error


def build_evaluation(
    job: PretrainJob, model: nn.Module, schedule: Schedule, mesh: Mesh, accelerator: Accelerator
) -> Callable[[], dict[str, float]] | None:
    """The held-out loss, if the data JSON names a validation set."""
    validation = getattr(job.data.dataset_param, "validation", None)
    if validation is None:
        return None
    kind = job.data.dataset_type
    if job.raw_clips is not None:
        config: Any = FeatureDatasetConfig(basic_parameters=validation)
        kind = config.dataset_type
    else:
        config = job.data.dataset_param.model_copy(
            update={"basic_parameters": validation, "validation": None}
        )
    source = open_dataset(kind, config, job)
    if not len(source):
        raise DataError("validation set is empty", where=validation.data_path)
    check_features(source, job)
    return partial(
        held_out_loss,
        model,
        source,
        schedule,
        quantiles=job.training.eval.eval_quantiles,
        most=job.training.eval.eval_iters * (job.training.batch.global_batch_size or 1),
        seed=job.training.batch.seed,
        exclude_refs=job.model.diffusion.ref_loss == "exclude",
        with_context=job.predictor.reads_context,
        device=accelerator.device,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        interval=interval_of,
        called=names_of_tasks(job, getattr(source, "tasks", ())),
    )


def names_of_tasks(job: PretrainJob, held_out: Sequence[str]) -> dict[str, str]:
    """Held-out task → the entry of the recipe that alone draws it, whose name training reports it under."""
    path = job.raw_clips.synthesis if job.raw_clips is not None else None
    entries = read_recipe(path).tasks if path is not None else {}
    of_task: dict[str, list[str]] = {}
    for name, entry in entries.items():
        of_task.setdefault(entry.task or name, []).append(name)
    return {task: names[0] for task, names in of_task.items() if len(names) == 1 and names[0] not in held_out}


def interval_of(losses: Sequence[float]) -> tuple[float, float] | None:
    """The interval of a mean over held-out records; None for too few of them."""
    found = mean_of(losses, rounds=2000)
    return None if found.low is None or found.high is None else (found.low, found.high)


def best_so_far(job: PretrainJob, iteration: int) -> Best | None:
    """The best checkpoint in --save, where this run resumes from it or from a later one."""
    checkpoint = job.training.checkpoint
    if not (checkpoint.save_best and checkpoint.save):
        return None
    found = read_best(Path(checkpoint.save))
    return found if found is not None and found.iteration <= iteration else None


def build_videos(
    job: PretrainJob, model: nn.Module, mesh: Mesh, accelerator: Accelerator
) -> Callable[[int], dict[str, float]] | None:
    """What the model generates at each evaluation, if the data JSON names an inference JSON.

    Under SAVE/validation.
    """
    validation = getattr(job.data.dataset_param, "validation", None)
    inference = getattr(validation, "prompts", None)
    if inference is None or job.training.checkpoint.save is None:
        return None
    from mindspeed_mm.tasks.validation_videos import ValidationVideos  # pulls in the VAE and the text encoder

    return ValidationVideos(
        Path(inference),
        model,
        mesh,
        accelerator,
        Path(job.training.checkpoint.save) / "validation",
        model_id=job.predictor.model_id,
        score=job.training.eval.eval_videos,
    )


def step_settings(job: PretrainJob) -> StepSettings:
    """What the step needs of the job; the number of micro-batches is Megatron's."""
    batch = job.training.batch
    return StepSettings(
        micro_batches=num_micro_batches(batch.micro_batch_size, batch.global_batch_size or 0, job.dp_size),
        seed=batch.seed,
        exclude_refs=job.model.diffusion.ref_loss == "exclude",
        clip_grad=job.training.optimizer.clip_grad,
    )


def task_settings(job: PretrainJob, loader: TrainLoader | RawBatches) -> Mapping[str, TaskSettings]:
    """The tasks of a recipe with a shift or a loss weight of their own."""
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
    """(R+F, h, w, text rows) → tokens and operations of one sample.

    Zeros where the model's spec tells no cost.
    """
    spec = MODELS.get(job.predictor.model_id)
    if not spec.cost:
        return lambda size: (0, Flops(0.0, 0.0))
    whole = whole_model(model)
    names = [name for name, _ in whole.named_modules() if name]
    plan = recompute_plan(names, spec.units, job.fsdp2, job.parallel)
    lora = lora_sizes(whole)
    more = (lora,) if lora else ()
    cost: Callable[[tuple[int, ...]], tuple[int, Flops]] = resolve(spec.cost)(job.predictor, plan, *more)
    return cost


def job_writers(job: PretrainJob, mesh: Mesh, resumed: int = 0) -> list[Writer]:
    """metrics.jsonl and its like on the last rank; job.json from the first."""
    save = job.training.checkpoint.save
    if save and mesh.rank == 0:
        write_job(job, Path(save))
    if mesh.rank != mesh.world_size - 1:
        return []
    return open_writers(job.training.log, save, job.model_dump(mode="json"), resumed)


def write_job(job: PretrainJob, folder: Path) -> None:
    """`folder`/job.json, whole or not at all."""
    write_text(folder / "job.json", job.to_json() + "\n")
