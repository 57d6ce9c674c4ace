"""Builds the micro-batches for training on raw clips.

The clips are checked once. The VAE and the text encoder run on the training device.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import torch.distributed as dist

from mindspeed_mm.accelerator import DTYPES, Accelerator
from mindspeed_mm.conditioning.extraction import DEFAULT_BATCH
from mindspeed_mm.conditioning.recipe import read_recipe
from mindspeed_mm.conditioning.synthesis import load_synthesized
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder
from mindspeed_mm.data.check import check_manifest
from mindspeed_mm.data.config import VaceDatasetConfig
from mindspeed_mm.data.content import STATE_FOLDER
from mindspeed_mm.data.loader import Collate
from mindspeed_mm.data.manifest import scan_manifest
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.log import get_logger, rank, world_size
from mindspeed_mm.models.umt5.encoder import LazyTextEncoder, load_text_encoder
from mindspeed_mm.models.wan.vae import LazyVae, load_vae
from mindspeed_mm.tasks.jobs.model_json import RawModelConfig
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.training.raw_clips import RawBatches, Stream

logger = get_logger(__name__)
Grid = tuple[int, int, int]  # frames, height, width


def build_raw_batches(
    job: PretrainJob, clips: VaceDatasetConfig, mesh: Mesh, accelerator: Accelerator
) -> RawBatches:
    """Build this rank's micro-batches, which are encoded during training.

    Raises DataError with the unusable rows.
    """
    batch, model = job.training.batch, cast(RawModelConfig, job.model)
    records, grids = usable_clips(job, clips)
    stream = Stream(
        records,
        grids,
        None if clips.synthesis is None else read_recipe(clips.synthesis),
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size or 1,
        seed=batch.seed,
        shuffle=job.data.dataloader_param.shuffle,
    )
    ae, text = model.ae, model.text_encoder
    vae = load_vae(ae.from_pretrained, dtype=DTYPES[ae.dtype], tiling=ae.enable_tiling)
    tokenizer = clips.tokenizer_config
    encoder = load_text_encoder(
        text.from_pretrained,
        tokenizer.from_pretrained,
        dtype=DTYPES[text.dtype],
        text_len=tokenizer.model_max_length,
    )
    width = getattr(job.predictor, "text_dim", encoder.text_dim)
    if width != encoder.text_dim:
        raise ConfigError(
            f"the text encoder has embeddings of size {encoder.text_dim}",
            where=f"{job.files.mm_model}:predictor.text_dim",
            expected=str(width),
            fix="use the text encoder that the model was trained with",
        )
    if rank() == 0:
        encoder.tokenizer.report_long((record.address, cap) for record in records for cap in record.captions)
    prompts = PromptCache(LazyTextEncoder(encoder, accelerator.device))
    collate = Collate(
        seed=batch.seed,
        caption_dropout=job.model.caption_dropout,
        null_prompt=prompts.encode([""])[0].to(accelerator.device) if job.model.caption_dropout else None,
        with_context=job.predictor.reads_context,
    )
    return RawBatches(
        stream,
        partial(load_synthesized, config=clips.preprocess_parameters),
        StreamEncoder(LazyVae(vae, accelerator.device), max_batch=DEFAULT_BATCH),
        prompts,
        collate,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        num_workers=batch.num_workers,
    )


def usable_clips(job: PretrainJob, clips: VaceDatasetConfig) -> tuple[list[SampleRecord], list[Grid]]:
    """Return the rows, and the number of frames and the size at which each is encoded.

    Rank 0 opens the clips. Raises DataError if a row cannot be used.
    """
    source = clips.basic_parameters
    manifest = scan_manifest(source.data_path, source.data_folder)
    found: list[list[Grid]] = [[]]

    def check_clips() -> None:
        if rank() == 0:
            save = job.training.checkpoint.save
            report = check_manifest(
                manifest,
                clips.preprocess_parameters,
                workers=None if job.training.batch.num_workers else 0,
                memory=Path(save) / STATE_FOLDER if save else None,
            )
            for line in report.summary().split("\n"):
                logger.info(line)
            report.enforce_error_budget(or_else="remove them from the list")
            found[0] = [(fact.frames, *fact.size) for fact in report.facts]

    raise_on_all_ranks(check_clips)
    if dist.is_initialized() and world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return list(manifest.records), found[0]
