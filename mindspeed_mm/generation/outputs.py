"""What becomes of a video's latents.

Files beside each other, the latents first; and the settings that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.generation.config import SamplingConfig
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.stages import decode, explain_oom
from mindspeed_mm.generation.stored import write_latents
from mindspeed_mm.generation.writer import versions, write_conditions, write_outcome
from mindspeed_mm.log import get_logger, on_every_rank

LOGGER = get_logger(__name__)


def describe(models: ModelStore, request: GenerationRequest, conditions: Conditions) -> dict[str, Any]:
    """Everything that makes this video again, and what it cost; plain values. On a process with a VAE."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "sampling": request.sampling.model_dump(mode="json"),
        **({"loras": [lora.model_dump(mode="json") for lora in request.loras]} if request.loras else {}),
        "notes": list(conditions.notes),
        "num_refs": len(conditions.src_ref_images),
        "tiled": models.vae.tiled,
        "device": models.accelerator.device_name(),
        "seconds": models.timings.report(),
        "peak_memory_gb": round(models.accelerator.max_memory_allocated() / 1e9, 3),
        "versions": versions(),
    }


class VideoFiles:
    """Writes videos into a folder: NAME.mp4, NAME.png, NAME.json and NAME/."""

    def __init__(self, models: ModelStore, folder: Path, run: dict[str, Any]) -> None:
        """`run`: what NAME.json says of the run."""
        self.models, self.folder, self.run = models, folder, run

    def write_conditions(self, request: GenerationRequest, conditions: Conditions) -> None:
        """Log and write what the model gets, before it is encoded."""
        for note in conditions.notes:
            LOGGER.info("  %s: %s", request.name, note, extra=on_every_rank())
        write_conditions(self.folder / request.name, conditions, request.sampling.fps)

    def write(self, request: GenerationRequest, conditions: Conditions, latents: Tensor) -> None:
        """The latents, then the video as it is decoded, its sheet and its settings."""

        def settings() -> dict[str, Any]:
            known = describe(self.models, request, conditions)
            made = {} if request.task is None else {"task": request.task.to_json()}
            return {"name": request.name, **known, "inputs": request.inputs.to_json(), **made, **self.run}

        name, num_refs = request.name, len(conditions.src_ref_images)
        kept = write_latents(self.folder / name, latents, num_refs, settings())
        write_decoded(
            self.models, name, latents, num_refs, request.sampling, self.folder, kept, settings, conditions
        )


def write_decoded(
    models: ModelStore,
    name: str,
    latents: Tensor,
    num_refs: int,
    sampling: SamplingConfig,
    folder: Path,
    kept: Path,
    settings: Callable[[], dict[str, Any]],
    conditions: Conditions | None = None,
) -> None:
    """The video as it is decoded, its sheet and its settings; a line names it and its cost.

    `kept`: the file of the latents.
    """
    with with_resume_hint(kept):
        path = write_outcome(
            folder,
            name,
            decode(models, latents, num_refs),
            num_frames=sampling.num_frames,
            fps=sampling.fps,
            conditions=conditions,
            settings=settings,
        )
    said = settings()
    cost = ", ".join(f"{phase} {seconds:g} s" for phase, seconds in said["seconds"].items())
    memory = said["peak_memory_gb"]
    LOGGER.info("  %s (%s; peak memory %.2f GB)", path, cost, memory, extra=on_every_rank())


@contextmanager
def with_resume_hint(latents: Path) -> Iterator[None]:
    """Let an error after denoising say how to go on from the latents."""
    hint = f"the latents are safe: run again with --from-latents {latents}"
    try:
        with explain_oom("", "while decoding", ""):
            yield
    except MindSpeedMMError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            hint += " --tiled always"
        raise error.advise(hint) from error.__cause__
