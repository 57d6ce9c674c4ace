"""The part of the generate command that needs torch.

It checks every input, embeds every prompt, and then generates the videos one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm.accelerator import DTYPES, Accelerator
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import DataError, LaunchError
from mindspeed_mm.generation.conditions import read_conditions
from mindspeed_mm.generation.config import OUTPUT_SUFFIXES, RunConfig
from mindspeed_mm.generation.denoise import scale_problem
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.layout import choose_layout
from mindspeed_mm.generation.loaders import inspect_experts, load_experts, load_text_encoder, load_vae
from mindspeed_mm.generation.loras import open_loras
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.outputs import VideoFiles, bytes_of, versions, write_decoded
from mindspeed_mm.generation.parallel import SINGLE, ContextParallel, DataParallel, SingleProcess
from mindspeed_mm.generation.request import GenerationRequest, Inputs, TaskRequest
from mindspeed_mm.generation.run import generate, share_prompts
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.stages import decode
from mindspeed_mm.generation.stored import LatentsSettings, read_latents
from mindspeed_mm.generation.usual import unusual_requests
from mindspeed_mm.log import get_logger, on_every_rank, rank, world_size
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.outputs import check_names, check_space
from mindspeed_mm.tasks.jobs.generate import GenerateJob
from mindspeed_mm.tasks.summary import write_job

LOGGER = get_logger(__name__)
_TIMEOUT = timedelta(hours=2)  # long, because the other processes wait while the main process decodes


def run(job: GenerateJob, accelerator: Accelerator) -> None:
    """Generate all videos of a job.

    Under torchrun, all processes work on each video. With `data_parallel`, each process generates its own
    share of the videos.
    """
    if job.run.from_latents is not None:
        if rank() == 0:
            warn_ignored_options(job.run, world_size())
            decode_latents(job, accelerator)
        return
    config = check_weights(job)
    warn_ignored_options(job.run, world_size())
    if world_size() == 1:
        work(job, job.videos, accelerator, config, SINGLE)
        return
    if job.run.data_parallel:
        with launch(accelerator, _TIMEOUT):
            work(job, job.videos[rank() :: world_size()], accelerator, config, DataParallel())
            barrier_or_raise()
        return
    layout = choose_layout(
        world_size(),
        config.trunk.num_heads,
        guided=any(video.sampling.needs_guidance for video in job.videos),
        cfg_parallel=job.run.cfg_parallel,
        context=job.run.context_parallel_size,
    )
    LOGGER.info(
        "%d processes: %d share the tokens, guidance on %d group(s)",
        layout.world,
        layout.context,
        layout.halves,
    )
    with launch(accelerator, _TIMEOUT):
        work(job, job.videos, accelerator, config, ContextParallel(layout, accelerator))


def barrier_or_raise() -> None:
    """Wait for all ranks, because torchrun treats a machine that exits minutes early as lost.

    Raises LaunchError if another rank failed.
    """
    try:
        dist.barrier()
    except RuntimeError as error:  # the type of torch's process-group errors
        raise LaunchError(
            "generated its videos, but another rank failed",
            where=f"rank {rank()}",
            fix="look for the first error in the log",
        ) from error


def warn_ignored_options(run: RunConfig, processes: int) -> None:
    """Log the options that have no effect with this number of processes."""
    ignored = [*run.sharing, *(["data_parallel"] if run.data_parallel else [])]
    if run.from_latents is not None:
        if ignored:
            LOGGER.warning("%s: ignored, because one process decodes from_latents", ", ".join(ignored))
    elif processes > 1:
        if run.shard_weights and run.offload != "none":
            LOGGER.info("offload %s is ignored: shard_weights decides where the weights are", run.offload)
    elif ignored:
        LOGGER.warning(
            "%s: ignored in a single process; use generate.sh to start several", ", ".join(ignored)
        )


def work(
    job: GenerateJob,
    videos: Sequence[GenerationRequest],
    accelerator: Accelerator,
    config: VaceConfig,
    parallel: SingleProcess,
) -> None:
    """Check all inputs, embed every prompt, then generate `videos`, all or some of the job's videos."""
    parallel.check(lambda: check_inputs(job, videos))
    if not videos:
        LOGGER.info(
            "rank %d is idle: %d videos for %d ranks",
            rank(),
            len(job.videos),
            world_size(),
            extra=on_every_rank(),
        )
        return
    models = open_models(job, accelerator, config.trunk.text_len, parallel)
    share_prompts(models, [prompt for video in videos for prompt in video.prompts], parallel)
    folder = Path(job.run.output_path)
    # A video named "job" writes its own settings to job.json.
    if rank() == 0 and all(video.name != "job" for video in job.videos):
        write_job(folder, job.to_json())
    files = VideoFiles(models, folder, run_settings(job))
    for video in videos:
        if parallel.is_main:  # once per group of processes that generates this video
            counter = f"[{job.videos.index(video) + 1}/{len(job.videos)}]"
            LOGGER.info("%s %s: %s", counter, video.name, _short(video.prompt), extra=on_every_rank())
        generate(
            models,
            video,
            files.write,
            parallel=parallel,
            on_conditions=files.write_conditions,
            progress=True,
            open_store=files.open_store,
        )


def open_models(
    job: GenerateJob,
    accelerator: Accelerator,
    text_len: int,
    parallel: SingleProcess = SINGLE,
    experts: Experts | None = None,
    *,
    keep_text_encoder: bool = False,
) -> ModelStore:
    """Load the VAE now, and the text encoder and the transformer on first use. `experts` replaces the latter.

    Only the main process has the VAE and the text encoder.
    """
    dtype, run = DTYPES[job.run.dtype], job.run
    return ModelStore(
        experts
        or (
            lambda: load_experts(
                job.model,
                dtype,
                accelerator,
                run.offload,
                parallel,
                shard=run.shard_weights,
                quantize=run.quantize,
            )
        ),
        parallel.run_on_main(lambda: load_vae(job.model, DTYPES[run.vae_dtype], accelerator)),
        lambda: load_text_encoder(job.model, dtype, accelerator, text_len),
        accelerator=accelerator,
        tiled=run.tiled,
        keep_text_encoder=keep_text_encoder,
    )


def check_inputs(job: GenerateJob, videos: Sequence[GenerationRequest]) -> None:
    """Check that the disk has room for all videos of the job, and read every source of `videos` once.

    This runs before any model is loaded, so that a bad mask of the last video is found before the first video
    takes an hour. Raises DataError.
    """
    needed = sum(bytes_of(video.sampling, len(video.inputs.src_ref_images)) for video in job.videos)
    check_space(Path(job.run.output_path), needed)
    seen: set[tuple[Inputs, SamplingConfig, TaskRequest | None]] = set()
    for video in videos:
        key = (video.inputs, video.sampling, video.task)
        if key not in seen:
            read_conditions(video)
            seen.add(key)


def check_weights(job: GenerateJob) -> VaceConfig:
    """Check the transformer files before the text encoder is read, and return the transformer's config.

    Raises WeightsError, ConfigError and DataError.
    """
    config = inspect_experts(job.model)
    if rank() == 0:
        for line in unusual_requests(config, {video.name: video.sampling for video in job.videos}):
            LOGGER.warning(line)
    for loras in {video.loras: None for video in job.videos}:
        open_loras(config, loras, len(job.model.experts))
    for video in job.videos:
        if problem := scale_problem(config, video.sampling):
            raise problem.as_kind(DataError).at(video.name)
        if not config.vace_layers and (video.inputs.given or video.task is not None):
            raise DataError(
                "these weights have no VACE branch, so they cannot use a video, mask or image",
                where=video.name,
            )
    return config


def run_settings(job: GenerateJob) -> dict[str, Any]:
    """Return the run settings that each NAME.json records."""
    return {
        "model": job.model.model_dump(mode="json"),
        "run": job.run.model_dump(mode="json"),
        "command": sys.argv,
    }


def decode_latents(job: GenerateJob, accelerator: Accelerator) -> None:
    """Decode latents of an earlier run (`--from-latents`), running every stage after denoising."""
    path, folder = Path(str(job.run.from_latents)), Path(job.run.output_path)
    latents, num_refs, stored = read_latents(path, verify=job.run.verify_checksums)
    check_names(folder, (f"{stored.name}{suffix}" for suffix in OUTPUT_SUFFIXES), "output_path")
    check_space(folder, bytes_of(stored.sampling, 0))
    warn_overridden_by_latents(job, stored)
    vae = load_vae(job.model, DTYPES[job.run.vae_dtype], accelerator)
    models = ModelStore(None, vae, None, accelerator=accelerator, tiled=job.run.tiled)
    models.start_measuring()

    def described() -> dict[str, Any]:
        return {
            **stored.model_dump(mode="json"),
            "seconds": {**stored.seconds, **models.timings.report()},
            "from_latents": str(path),
            "tiled": models.vae.tiled,
            "peak_memory_gb": round(accelerator.max_memory_allocated() / 1e9, 3),  # of decoding only
            "versions": versions(),
        }

    if stored.sampling.paste_back is not None:
        LOGGER.warning("%s: paste_back is ignored, because the latents file lacks the source", stored.name)
    chunks = decode(models, latents, num_refs)
    write_decoded(stored.name, chunks, stored.sampling, folder, path, described)


def warn_overridden_by_latents(job: GenerateJob, stored: LatentsSettings) -> None:
    """Warn if the job sets a number of frames, size or fps that differs from that of the latents."""
    named = [video for video in job.videos if video.name == stored.name]
    for video in named or job.videos[:1]:
        for key in ("num_frames", "height", "width", "fps"):
            requested, made = getattr(video.sampling, key), getattr(stored.sampling, key)
            if requested != made:
                LOGGER.warning(
                    "%s: %s is %s, but the latents were made with %s, which is used",
                    video.name,
                    key,
                    requested,
                    made,
                )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
