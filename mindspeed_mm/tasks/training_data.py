"""Opens and checks the datasets of a PretrainJob, and reads them as micro-batches."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.content import map_in_threads
from mindspeed_mm.data.loader import Collate, TrainLoader
from mindspeed_mm.data.registry import DATASETS
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.errors import DataError
from mindspeed_mm.log import rank, world_size
from mindspeed_mm.registry import resolve
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.training.raw_clips import RawBatches


def open_dataset(kind: str, config: Any, job: PretrainJob) -> Any:
    """Open a training or held-out dataset of the job. `--no-verify-checksums` disables its checksums."""
    if job.training.checkpoint.no_verify_checksums and hasattr(config, "verify_checksums"):
        config = config.model_copy(update={"verify_checksums": False})
    return resolve(DATASETS.get(kind).build)(config)


def build_loader(job: PretrainJob, mesh: Mesh, accelerator: Accelerator) -> TrainLoader | RawBatches:
    """Build the loader for this rank's micro-batches. Raises DataError if features do not fit the model."""
    if job.raw_clips is not None:
        from mindspeed_mm.tasks.raw_training import build_raw_batches  # imports diffusers and transformers

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
    """Check the headers of all features. Each rank checks its share.

    All ranks raise the same DataError. A dataset from another package is checked if it has the methods
    `check` and `check_null_prompt` of FeatureDataset.
    """
    check = getattr(dataset, "check", None)
    if check is None:
        return
    text_dim, text_len = getattr(job.predictor, "text_dim", None), getattr(job.predictor, "text_len", None)
    if job.model.caption_dropout and text_dim is not None and hasattr(dataset, "check_null_prompt"):
        dataset.check_null_prompt(text_dim, text_len)

    def failure(index: int) -> DataError | None:
        try:
            check(index, text_dim=text_dim, text_len=text_len)
        except DataError as error:
            return error
        return None

    def first_failure() -> None:
        for error in map_in_threads(failure, range(rank(), len(dataset), world_size())):
            if error is not None:
                raise error

    raise_on_all_ranks(first_failure)
