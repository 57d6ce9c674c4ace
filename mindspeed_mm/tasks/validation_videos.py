"""Videos of the model in training, made by the same code as `Wan-VACE-Inference.py`: same seeds, same files, same bits."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.errors import ConfigError, NonFiniteError
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.inputs import Conditions
from mindspeed_mm.generation.layout import Layout
from mindspeed_mm.generation.parts import load_image_coder, load_text
from mindspeed_mm.generation.pipeline import VacePipeline
from mindspeed_mm.generation.team import Solo, Team
from mindspeed_mm.log import get_logger, rank
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.tasks.generate_videos import DTYPES, check_inputs, conditions_of, embed_prompts, write
from mindspeed_mm.tasks.jobs.generate import GenerateJob, VideoJob

LOGGER = get_logger(__name__)


class ValidationVideos:
    """The videos of one inference JSON, made again at each evaluation. Its `model.transformer` is the one in training.

    Sources and prompts are encoded once; between evaluations the VAE waits on the host and the text encoder is gone.
    """

    def __init__(
        self, inference: Path, model: nn.Module, mesh: Mesh, accelerator: Accelerator, folder: Path
    ) -> None:
        """Raises the errors of a generation run for a JSON that cannot be honoured."""
        if not isinstance(model, VaceTransformer):
            raise ConfigError(
                f"{inference}: validation videos need a VACE model, this is a {type(model).__name__}"
            )
        job = GenerateJob.from_file(inference, transformer_at_hand=True)
        self.job = job.model_copy(update={"run": job.run.model_copy(update={"output_path": str(folder)})})
        if len(self.job.model.experts) != 1:
            raise ConfigError(
                f"{inference}:model.transformer: one of two experts makes no video alone; leave validation.prompts out"
            )
        self.model, self.mesh, self.accelerator, self.folder = model, mesh, accelerator, folder
        self.team = Team(Layout(mesh.cp_size, 1), accelerator, mesh) if mesh.world_size > 1 else Solo()
        self.team.from_first(lambda: check_inputs(self.job, self.job.videos))
        self._pipe: VacePipeline | None = None
        self._shown: dict[str, tuple[Conditions | None, Tensor]] = {}

    def __call__(self, iteration: int) -> None:
        """Write all videos of `iteration` to FOLDER/iter_0000010. Called on every rank."""
        was_training = self.model.training
        self.model.eval()
        pipe = self._pipeline()
        run = self.job.run.model_copy(update={"output_path": str(self.folder / f"iter_{iteration:07d}")})
        job = self.job.model_copy(update={"run": run})
        for video in job.videos:
            try:
                self._make(pipe, job, video)
            except NonFiniteError as error:  # every rank sees the same latents
                _warn(iteration, video, error)
        if self.team.first:
            pipe.vae.to("cpu")
        self.accelerator.empty_cache()
        self.model.train(was_training)

    def _make(self, pipe: VacePipeline, job: GenerateJob, video: VideoJob) -> None:
        pipe.start_measuring()
        if video.name not in self._shown:
            conditions = conditions_of(video) if self.team.first else None
            context = self.team.from_first(lambda: _encoded(pipe, conditions, video))
            self._shown[video.name] = (conditions, context)
        conditions, context = self._shown[video.name]
        texts = pipe.texts(video.prompt, video.negative_prompt, video.sampling)
        num_refs = len(video.inputs.images)
        latents = pipe.denoise(context, texts, video.sampling, num_refs=num_refs).cpu()
        failed = self.team.from_first(lambda: _written(pipe, job, video, conditions, latents))
        if failed is not None:
            raise failed

    def _pipeline(self) -> VacePipeline:
        """Made at the first evaluation; later the VAE only comes back."""
        if self._pipe is None:
            run, paths = self.job.run, self.job.model
            text_len = self.model.config.trunk.text_len
            pipe = VacePipeline(
                Experts([self.model], self.accelerator, placed=True, dtype=DTYPES[run.dtype]),
                self.team.from_first_alone(
                    lambda: load_image_coder(paths, DTYPES[run.vae_dtype], self.accelerator)
                ),
                lambda: load_text(paths, DTYPES[run.dtype], self.accelerator, text_len),
                accelerator=self.accelerator,
                tiled=run.tiled,
                guide=self.team.guide,
            )
            pipe.remember(self.team.from_first(lambda: embed_prompts(pipe, self.job.videos)))
            self._pipe = pipe
        elif self.team.first:
            self._pipe.vae.to(self.accelerator.device)
        return self._pipe


def _written(
    pipe: VacePipeline, job: GenerateJob, video: VideoJob, conditions: Conditions | None, latents: Tensor
) -> NonFiniteError | None:
    """Write the video; the error where its pixels are not finite, which is no reason to end the training."""
    try:
        write(pipe, job, video, conditions, latents)
    except NonFiniteError as error:
        return error
    return None


def _warn(iteration: int, video: VideoJob, error: NonFiniteError) -> None:
    """Once for all ranks: the training goes on, and its own guard judges its loss."""
    if rank() == 0:
        LOGGER.warning(
            "iteration %d, validation video %s: %s; training goes on", iteration, video.name, error
        )


def _encoded(pipe: VacePipeline, conditions: Conditions | None, video: VideoJob) -> Tensor:
    assert conditions is not None
    with torch.no_grad():
        return pipe.encode(conditions, video.sampling).cpu()
