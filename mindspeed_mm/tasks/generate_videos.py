"""The part of the generate command that needs torch: load, check every input, embed every prompt, then video after video."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import DataError, LaunchError, MindSpeedMMError
from mindspeed_mm.generation.config import RunConfig
from mindspeed_mm.generation.denoise import StepHook
from mindspeed_mm.generation.inputs import Conditions, Inputs, load_conditions
from mindspeed_mm.generation.layout import choose_layout
from mindspeed_mm.generation.parts import inspect_experts, load_experts, load_image_coder, load_text
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.team import Replica, Solo, Team
from mindspeed_mm.generation.usual import unusual_requests
from mindspeed_mm.generation.writer import (
    bytes_of,
    check_space,
    read_latents,
    versions,
    write_conditions,
    write_latents,
    write_outcome,
)
from mindspeed_mm.log import get_logger, on_every_rank, rank, world_size
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.progress import Progress
from mindspeed_mm.tasks.jobs.generate import GenerateJob, VideoJob
from mindspeed_mm.tasks.summary import write_job

LOGGER = get_logger(__name__)
_TIMEOUT = timedelta(hours=2)  # the others wait while the first process decodes
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(job: GenerateJob, accelerator: Accelerator) -> None:
    """All videos of a job, by this process, together with torchrun's others, or (`data_parallel`) some by each."""
    if job.run.from_latents is not None:
        if rank() == 0:
            say_what_is_not_followed(job.run, world_size())
            decode_latents(job, accelerator)
        return
    config = check_weights(job)
    say_what_is_not_followed(job.run, world_size())
    if world_size() == 1:
        work(job, job.videos, accelerator, config, Solo())
        return
    if job.run.data_parallel:
        with launch(accelerator, _TIMEOUT):
            work(job, job.videos[rank() :: world_size()], accelerator, config, Replica())
            wait_for_the_others()
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
        work(job, job.videos, accelerator, config, Team(layout, accelerator))


def wait_for_the_others() -> None:
    """torchrun takes a machine that ends minutes before the others for a lost one. Raises LaunchError if a process failed."""
    try:
        dist.barrier()
    except RuntimeError as error:  # torch's errors of process groups are RuntimeErrors, too
        raise LaunchError(
            f"process {rank()} made its videos, but another failed; look for the first error in the log"
        ) from error


def say_what_is_not_followed(run: RunConfig, processes: int) -> None:
    """What this number of processes does not follow is not passed over in silence."""
    asked = [*run.sharing, *(["data_parallel"] if run.data_parallel else [])]
    if run.from_latents is not None:
        if asked:
            LOGGER.warning("%s: left out, for one process decodes from_latents", ", ".join(asked))
    elif processes > 1:
        if run.shard_weights and run.offload != "none":
            LOGGER.info(
                "offload %s is left out: the weights lie where shard_weights spreads them", run.offload
            )
    elif asked:
        LOGGER.warning(
            "%s: for several processes, and this is one; start them with generate.sh", ", ".join(asked)
        )


def work(
    job: GenerateJob, videos: Sequence[VideoJob], accelerator: Accelerator, config: VaceConfig, team: Solo
) -> None:
    """Check everything, embed every prompt, then one of `videos`, which are all or some of the job's, after another."""
    team.check(lambda: check_inputs(job, videos))
    if not videos:
        LOGGER.info(
            "process %d has no video to make: there are %d", rank(), len(job.videos), extra=on_every_rank()
        )
        return
    pipe = team_pipeline(job, accelerator, config, team)
    pipe.remember(team.from_first(lambda: embed_prompts(pipe, videos)))
    if rank() == 0 and all(
        video.name != "job" for video in job.videos
    ):  # whose settings would be in that file
        write_job(Path(job.run.output_path), job.to_json())
    for video in videos:
        if team.first:  # of those that make this video
            place = f"[{job.videos.index(video) + 1}/{len(job.videos)}]"
            LOGGER.info("%s %s: %s", place, video.name, _short(video.prompt), extra=on_every_rank())
        generate_one(pipe, job, video, team)


def team_pipeline(job: GenerateJob, accelerator: Accelerator, config: VaceConfig, team: Solo) -> VacePipeline:
    """The VAE now; the text encoder and the transformer when they are needed. Only the first process has the first two."""
    dtype = DTYPES[job.run.dtype]
    vae = team.from_first_alone(lambda: load_image_coder(job.model, DTYPES[job.run.vae_dtype], accelerator))
    return VacePipeline(
        lambda: load_experts(
            job.model, dtype, accelerator, job.run.offload, team, shard=job.run.shard_weights
        ),
        vae,
        lambda: load_text(job.model, dtype, accelerator, config.trunk.text_len),
        accelerator=accelerator,
        tiled=job.run.tiled,
        guide=team.guide,
    )


def check_inputs(job: GenerateJob, videos: Sequence[VideoJob]) -> None:
    """Look at the disk, which takes all of the job's videos, and read every source of `videos` once before anything is loaded.

    So the last video's bad mask does not cost the first one's hour. Raises DataError.
    """
    needed = sum(bytes_of(video.sampling, len(video.inputs.images)) for video in job.videos)
    check_space(Path(job.run.output_path), needed)
    seen: set[str] = set()
    for video in videos:
        key = json.dumps(
            [video.inputs.model_dump(mode="json"), video.sampling.model_dump(mode="json")], sort_keys=True
        )
        if key not in seen:
            conditions_of(video)
            seen.add(key)


def check_weights(job: GenerateJob) -> VaceConfig:
    """Look into the transformer files before the text encoder is read. Returns their sizes. Raises WeightsError, ConfigError."""
    config = inspect_experts(job.model)
    if rank() == 0:
        for line in unusual_requests(config, {video.name: video.sampling for video in job.videos}):
            LOGGER.warning(line)
    for video in job.videos:
        scale = video.sampling.context_scale
        if isinstance(scale, tuple) and len(scale) != len(config.vace_layers):
            raise DataError(
                f"{video.name}: context_scale has {len(scale)} numbers; give one, or one for each of {len(config.vace_layers)} branch blocks"
            )
        if not config.vace_layers and video.inputs.given:
            raise DataError(
                f"{video.name}: these weights have no VACE branch, so they cannot look at a video, mask or image"
            )
    return config


def conditions_of(video: VideoJob) -> Conditions:
    """What the model will be shown. Raises DataError beginning with the video's name."""
    paths = video.inputs
    inputs = Inputs(
        src_video=paths.video,
        src_mask=paths.mask,
        src_ref_images=paths.images,
        first_frame=paths.first_frame,
        last_frame=paths.last_frame,
        outpaint=paths.outpaint,
    )
    try:
        return load_conditions(inputs, video.sampling)
    except DataError as error:
        raise DataError(f"{video.name}: {error}") from None


def embed_prompts(pipe: VacePipeline, videos: Sequence[VideoJob]) -> dict[str, Tensor]:
    """All prompts of all videos in one go; then the text encoder is gone."""
    asked: list[str] = []
    for video in videos:
        asked += [video.prompt, *([video.negative_prompt] if video.sampling.needs_guidance else [])]
    with enough_memory(""):
        pipe.embed(asked)
    pipe.free_text_encoder()
    return pipe.known(asked)


def generate_one(pipe: VacePipeline, job: GenerateJob, video: VideoJob, team: Solo) -> Tensor:
    """One video from sources to files. Latents are on disk before they are decoded. Returns them, [16, R+F, h, w]."""
    folder = Path(job.run.output_path)
    pipe.start_measuring()
    conditions = conditions_of(video) if team.first else None
    context = team.from_first(lambda: show(pipe, video, conditions, folder))
    texts = pipe.texts(video.prompt, video.negative_prompt, video.sampling)
    with enough_memory(f"{video.name}: "):
        pipe.load_experts()  # outside the bar, whose time that is left knows denoising steps alone
    with denoising_progress(video.name, video.sampling.steps) as on_step, enough_memory(f"{video.name}: "):
        num_refs = len(video.inputs.images)
        latents = pipe.denoise(context, texts, video.sampling, num_refs=num_refs, hooks=[on_step]).cpu()
    team.from_first(lambda: write(pipe, job, video, conditions, latents))
    return latents


def show(pipe: VacePipeline, video: VideoJob, conditions: Conditions | None, folder: Path) -> Tensor:
    """Say and write what the model is shown; vace_context on the host."""
    assert conditions is not None
    for note in conditions.notes:
        LOGGER.info("  %s: %s", video.name, note, extra=on_every_rank())
    write_conditions(folder / video.name, conditions, video.sampling.fps)
    with enough_memory(f"{video.name}: "):
        return pipe.encode(conditions, video.sampling).cpu()


def write(
    pipe: VacePipeline, job: GenerateJob, video: VideoJob, conditions: Conditions | None, latents: Tensor
) -> None:
    """Latents first, then the video, its sheet and its settings."""
    assert conditions is not None
    folder, num_refs = Path(job.run.output_path), len(conditions.src_ref_images)
    kept = write_latents(folder / video.name, latents, num_refs, settings_of(pipe, job, video, conditions))
    with resumable(kept):
        path = write_outcome(
            folder,
            video.name,
            pipe.decode(latents, num_refs),
            num_frames=video.sampling.num_frames,
            fps=video.sampling.fps,
            conditions=conditions,
            settings=lambda: settings_of(pipe, job, video, conditions),
        )
    _tell(path, settings_of(pipe, job, video, conditions))


def settings_of(
    pipe: VacePipeline, job: GenerateJob, video: VideoJob, conditions: Conditions | None
) -> dict[str, Any]:
    """Every argument, with what it cost."""
    return {
        "name": video.name,
        **pipe.describe(video.prompt, video.negative_prompt, conditions, video.sampling),
        "inputs": video.inputs.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "run": job.run.model_dump(mode="json"),
        "command": sys.argv,
    }


def decode_latents(job: GenerateJob, accelerator: Accelerator) -> None:
    """--from-latents: the part of an earlier run that comes after denoising."""
    latents, num_refs, settings = read_latents(
        Path(str(job.run.from_latents)), verify=job.run.verify_checksums
    )
    say_what_latents_decide(job, settings)
    pipe = VacePipeline(
        None,
        load_image_coder(job.model, DTYPES[job.run.vae_dtype], accelerator),
        None,
        accelerator=accelerator,
        tiled=job.run.tiled,
    )
    pipe.start_measuring()

    def described() -> dict[str, Any]:
        seconds = {**settings.get("seconds", {}), **pipe.timings.report()}
        return {
            **settings,
            "seconds": seconds,
            "from_latents": str(job.run.from_latents),
            "tiled": pipe.vae.tiled,
            "peak_memory_gb": round(accelerator.max_memory_allocated() / 1e9, 3),  # of decoding
            "versions": versions(),
        }

    with resumable(Path(str(job.run.from_latents))):
        path = write_outcome(
            Path(job.run.output_path),
            settings["name"],
            pipe.decode(latents, num_refs),
            num_frames=settings["sampling"]["num_frames"],
            fps=settings["sampling"]["fps"],
            conditions=None,
            settings=described,
        )
    _tell(path, described())


def say_what_latents_decide(job: GenerateJob, settings: dict[str, Any]) -> None:
    """Frames, size and rate are those of the run that made the latents; a request for others is not passed over in silence."""
    named = [video for video in job.videos if video.name == settings["name"]]
    for video in named or job.videos[:1]:
        for key in ("num_frames", "height", "width", "fps"):
            asked, made = getattr(video.sampling, key), settings["sampling"][key]
            if asked != made:
                LOGGER.warning(
                    "%s: %s %s is asked for, but the latents were made for %s; they decide",
                    video.name,
                    key,
                    asked,
                    made,
                )


@contextmanager
def denoising_progress(name: str, steps: int) -> Iterator[StepHook]:
    """A bar for a video's denoising steps; in a log five lines."""
    with Progress(f"{name}: denoising", steps, "step", lines=5) as bar:
        yield lambda step: bar.step()


@contextmanager
def enough_memory(where: str) -> Iterator[None]:
    """A device that is too small for a model becomes one line that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise DataError(
            f"{where}out of memory before decoding; set offload to model or block, let more processes share a video (shard_weights), "
            "or ask for a smaller size or fewer frames"
        ) from None


@contextmanager
def resumable(latents: Path) -> Iterator[None]:
    """An error after denoising says how to go on from the latents."""
    try:
        yield
    except MindSpeedMMError as error:
        raise type(error)(f"{error}; the latents are safe: run again with --from-latents {latents}") from None
    except torch.OutOfMemoryError:
        raise DataError(
            f"out of memory while decoding; the latents are safe: run again with --from-latents {latents} --tiled always"
        ) from None


def _tell(path: Path, settings: dict[str, Any]) -> None:
    cost = ", ".join(f"{phase} {seconds:g} s" for phase, seconds in settings["seconds"].items())
    LOGGER.info(
        "  %s (%s; peak memory %.2f GB)", path, cost, settings["peak_memory_gb"], extra=on_every_rank()
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"
