"""Generates videos with the model in training.

Uses the code of `Wan-VACE-Inference.py`, so the same seeds give bit-identical videos.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from mindspeed_mm.accelerator import DTYPES, Accelerator
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.distributed.pipeline import Pipeline, whole_model
from mindspeed_mm.errors import ConfigError, NonFiniteError
from mindspeed_mm.evaluation.metrics.catalog import all_metrics
from mindspeed_mm.evaluation.report import ALL, FILE_NAME, score_folder, write_report
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.layout import Layout
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.outputs import VideoFiles
from mindspeed_mm.generation.parallel import ContextParallel, SingleProcess
from mindspeed_mm.generation.result import GeneratedVideo
from mindspeed_mm.generation.run import Encoded, generate, share_prompts
from mindspeed_mm.log import get_logger, rank
from mindspeed_mm.models.spec import generating_spec
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.tasks.generate_videos import check_inputs, open_models, run_settings
from mindspeed_mm.tasks.jobs.generate import GenerateJob

LOGGER = get_logger(__name__)


class ValidationVideos:
    """The videos of one inference JSON, generated at each evaluation.

    The model in training replaces the JSON's `model.transformer`. Sources and prompts are encoded only once.
    Between evaluations, the VAE is on the host, and the text encoder is freed.
    """

    def __init__(
        self,
        inference: Path,
        model: nn.Module,
        mesh: Mesh,
        accelerator: Accelerator,
        folder: Path,
        *,
        model_id: str = "vace",
        score: bool = False,
    ) -> None:
        """`model_id`: the id of the model in training. `score`: also score the videos.

        Raises the same errors as a generation run if the JSON cannot be used.
        """
        generating_spec(model_id, str(inference))
        whole = whole_model(model)
        job = GenerateJob.from_file(inference, transformer_at_hand=True)
        run = job.run.model_copy(update={"output_path": str(folder)})
        weights = job.model.model_copy(update={"model_id": model_id})
        self.job = job.model_copy(update={"run": run, "model": weights})
        if len(self.job.model.experts) != 1:
            raise ConfigError(
                "one of two experts cannot generate a video alone",
                where=f"{inference}:model.transformer",
                fix="remove validation.prompts",
            )
        if isinstance(model, Pipeline) and any(video.loras for video in self.job.videos):
            raise ConfigError(
                "LoRAs cannot be added to a model in pipeline stages",
                where=f"{inference}:loras",
                fix="remove loras, or train without pipeline stages",
            )
        self.score = score
        self.model = cast(VaceTransformer, model)  # or a Pipeline, which is called in the same way
        self.mesh, self.accelerator, self.folder = mesh, accelerator, folder
        self.count = sum(weight.numel() for weight in whole.parameters())
        self.parallel = (
            ContextParallel(Layout(mesh.cp_size, 1), accelerator, mesh)
            if mesh.world_size > 1
            else SingleProcess()
        )
        self.parallel.run_on_main_and_broadcast(lambda: check_inputs(self.job, self.job.videos))
        self._models: ModelStore | None = None
        self._encoded: dict[str, Encoded] = {}

    def __call__(self, iteration: int) -> dict[str, float]:
        """Write the videos of an iteration, for example to FOLDER/iter_0000010, and return their scores.

        Every rank must call it.
        """
        was_training = self.model.training
        self.model.eval()
        models = self._open_models()
        folder = self.folder / f"iter_{iteration:07d}"
        run = self.job.run.model_copy(update={"output_path": str(folder)})
        files = VideoFiles(models, folder, run_settings(self.job.model_copy(update={"run": run})))
        for video in self.job.videos:
            try:
                generate(models, video, self._finish(files), parallel=self.parallel, encoded=self._encoded)
            except NonFiniteError as error:  # raised on every rank; not fatal, as FiniteGuard checks training
                if rank() == 0:
                    LOGGER.warning(
                        "iteration %d, validation video %s: %s; training continues",
                        iteration,
                        video.name,
                        error,
                    )
        if self.parallel.is_main:
            models.vae.to("cpu")
        self.accelerator.empty_cache()
        self.model.train(was_training)
        return self.parallel.run_on_main_and_broadcast(lambda: _scores(folder)) if self.score else {}

    def _finish(self, files: VideoFiles) -> Callable[[GeneratedVideo], None]:
        def finish(made: GeneratedVideo) -> None:
            if self.score:  # scoring reads the conditions stored with the video
                files.write_conditions(made.request, made.conditions)
            files.write(made)

        return finish

    def _open_models(self) -> ModelStore:
        """Open the models at the first evaluation. Later ones only move the VAE back to the device."""
        if self._models is None:
            experts = Experts(
                [self.model],
                self.accelerator,
                placed=True,
                dtype=DTYPES[self.job.run.dtype],
                count=self.count,
            )
            text_len = self.model.config.trunk.text_len
            self._models = open_models(self.job, self.accelerator, text_len, self.parallel, experts)
            prompts = [prompt for video in self.job.videos for prompt in video.prompts]
            share_prompts(self._models, prompts, self.parallel)
        elif self.parallel.is_main:
            self._models.vae.to(self.accelerator.device)
        return self._models


def _scores(folder: Path) -> dict[str, float]:
    """Score the videos, write eval.json, and return the overall means and, with several tasks, those of each.

    Returns {} if there is no video.
    """
    if not any(folder.glob("*.mp4")):
        return {}
    report = score_folder(folder, all_metrics())
    write_report(report, folder / FILE_NAME)
    means = report.means()
    found: dict[str, float] = {}
    for task, row in means.items():
        prefix = "" if task == ALL or len(means) == 1 else f"{task}/"
        found |= {f"validation/videos/{prefix}{name}": mean.mean for name, mean in row.items()}
    return found
