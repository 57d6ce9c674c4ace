"""Builds the hooks of a PretrainJob: the built-in hooks in order, then those of the model JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.conditioning.recipe import read_recipe
from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.config import FeatureDatasetConfig
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.errors import DataError
from mindspeed_mm.evaluation.stats import mean_of
from mindspeed_mm.files import write_text
from mindspeed_mm.flow.schedule import Schedule
from mindspeed_mm.models.wan.flops import peak_tflops
from mindspeed_mm.registry import resolve
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.training_data import check_features, open_dataset
from mindspeed_mm.training.checkpoint_folder import Best, read_best
from mindspeed_mm.training.hooks.base import Hook
from mindspeed_mm.training.hooks.best_checkpoint import BestCheckpoint
from mindspeed_mm.training.hooks.config import TRAINING_HOOKS
from mindspeed_mm.training.hooks.evaluation import Evaluation
from mindspeed_mm.training.hooks.finite_guard import FiniteGuard
from mindspeed_mm.training.hooks.log_line import LogLine
from mindspeed_mm.training.hooks.metric_writers import MetricWriter, MetricWriters, open_writers
from mindspeed_mm.training.hooks.observer import Observer
from mindspeed_mm.training.hooks.samples import Samples
from mindspeed_mm.training.hooks.spikes import Spikes
from mindspeed_mm.training.profiler import build_observer
from mindspeed_mm.training.validation import held_out_loss


def build_hooks(
    job: PretrainJob,
    model: nn.Module,
    schedule: Schedule,
    mesh: Mesh,
    accelerator: Accelerator,
    resumed: int,
) -> list[Hook]:
    """Build all hooks of a run that resumes after iteration `resumed`."""
    training = job.training
    peak = training.log.peak_tflops or peak_tflops(accelerator.device_name(), job.predictor.dtype)
    measure = build_evaluation(job, model, schedule, mesh, accelerator)
    writers = job_writers(job, mesh, resumed)
    observe = build_observer(job.tools, training.profile, accelerator.device, mesh.rank)
    make = build_videos(job, model, mesh, accelerator)
    hooks = [FiniteGuard(), Spikes(), Observer(observe), MetricWriters(writers, peak), LogLine(peak)]
    if measure is not None and training.eval.eval_iters:
        hooks.append(Evaluation(measure))
    if training.checkpoint.save_best:
        hooks.append(BestCheckpoint(best_so_far(job, resumed)))
    if make is not None:
        hooks.append(Samples(make))
    return [*hooks, *map(build_hook, job.model.hooks)]


def build_hook(config: Config) -> Hook:
    """Build the hook for one entry of `hooks` in the model JSON."""
    name = str(getattr(config, "type", ""))
    hook: Hook = resolve(TRAINING_HOOKS.get(name).build)(config)
    hook.name = name
    return hook


def build_evaluation(
    job: PretrainJob, model: nn.Module, schedule: Schedule, mesh: Mesh, accelerator: Accelerator
) -> Callable[[], dict[str, float]] | None:
    """Return the function that computes the held-out loss, or None if the data JSON has no validation set."""
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
        max_records=job.training.eval.eval_iters * (job.training.batch.global_batch_size or 1),
        seed=job.training.batch.seed,
        exclude_refs=job.model.diffusion.ref_loss == "exclude",
        with_context=job.predictor.reads_context,
        device=accelerator.device,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        interval=interval_of,
        task_labels=names_of_tasks(job, getattr(source, "tasks", ())),
    )


def names_of_tasks(job: PretrainJob, held_out: Sequence[str]) -> dict[str, str]:
    """Map each held-out task to the recipe entry that draws it, if exactly one entry does.

    Training reports the task under the name of the entry.
    """
    path = job.raw_clips.synthesis if job.raw_clips is not None else None
    entries = read_recipe(path).tasks if path is not None else {}
    of_task: dict[str, list[str]] = {}
    for name, entry in entries.items():
        of_task.setdefault(entry.task or name, []).append(name)
    return {task: names[0] for task, names in of_task.items() if len(names) == 1 and names[0] not in held_out}


def interval_of(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of a mean over held-out records, or None if there are too few."""
    found = mean_of(losses, rounds=2000)
    return None if found.low is None or found.high is None else (found.low, found.high)


def best_so_far(job: PretrainJob, iteration: int) -> Best | None:
    """Return the best checkpoint in --save if this run resumes from it or a later one, else None."""
    checkpoint = job.training.checkpoint
    if not (checkpoint.save_best and checkpoint.save):
        return None
    found = read_best(Path(checkpoint.save))
    return found if found is not None and found.iteration <= iteration else None


def build_videos(
    job: PretrainJob, model: nn.Module, mesh: Mesh, accelerator: Accelerator
) -> Callable[[int], dict[str, float]] | None:
    """Return the function that generates the validation videos, or None if the data JSON names none.

    The videos are written to SAVE/validation.
    """
    validation = getattr(job.data.dataset_param, "validation", None)
    inference = getattr(validation, "prompts", None)
    if inference is None or job.training.checkpoint.save is None:
        return None
    from mindspeed_mm.tasks.validation_videos import ValidationVideos  # lazy: imports VAE and text encoder

    return ValidationVideos(
        Path(inference),
        model,
        mesh,
        accelerator,
        Path(job.training.checkpoint.save) / "validation",
        model_id=job.predictor.model_id,
        score=job.training.eval.eval_videos,
    )


def job_writers(job: PretrainJob, mesh: Mesh, resumed: int = 0) -> list[MetricWriter]:
    """Open the metric writers (metrics.jsonl and others) on the last rank, and write job.json on rank 0."""
    save = job.training.checkpoint.save
    if save and mesh.rank == 0:
        write_job(job, Path(save))
    if mesh.rank != mesh.world_size - 1:
        return []
    return open_writers(job.training.log, save, job.model_dump(mode="json"), resumed)


def write_job(job: PretrainJob, folder: Path) -> None:
    """Write `folder`/job.json atomically."""
    write_text(folder / "job.json", job.to_json() + "\n")
