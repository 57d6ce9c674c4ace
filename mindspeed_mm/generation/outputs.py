"""Writes the outputs of a video: the latents, then the decoded video, its contact sheet and its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.result import GeneratedVideo
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.stages import explain_oom
from mindspeed_mm.generation.stored import write_latents
from mindspeed_mm.generation.windows.store import WindowStore, identity
from mindspeed_mm.generation.writer import Frames, versions, write_conditions, write_outcome
from mindspeed_mm.log import get_logger, on_every_rank

LOGGER = get_logger(__name__)


def describe(models: ModelStore, made: GeneratedVideo) -> dict[str, Any]:
    """Return the settings that reproduce this video and its cost, as plain values.

    The process must have a VAE.
    """
    request, conditions, report = made.request, made.conditions, made.report()
    prompts = list(request.window_prompts)
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "sampling": request.sampling.model_dump(mode="json"),
        **({"loras": [lora.model_dump(mode="json") for lora in request.loras]} if request.loras else {}),
        **({"window_prompts": prompts} if prompts else {}),
        **({"windows": report} if report else {}),
        "notes": list(conditions.notes),
        "num_refs": len(conditions.src_ref_images),
        "tiled": models.vae.tiled,
        "device": models.accelerator.device_name(),
        "seconds": models.timings.report(),
        "peak_memory_gb": round(models.accelerator.max_memory_allocated() / 1e9, 3),
        "versions": versions(),
    }


class VideoFiles:
    """Writes videos to a folder: NAME.mp4, NAME.png, NAME.json and NAME/."""

    def __init__(self, models: ModelStore, folder: Path, run: dict[str, Any]) -> None:
        """Create a writer. `run` contains the run settings for NAME.json."""
        self.models, self.folder, self.run = models, folder, run

    def write_conditions(self, request: GenerationRequest, conditions: Conditions) -> None:
        """Log the notes of the conditions, and write the conditions before they are encoded."""
        for note in conditions.notes:
            LOGGER.info("  %s: %s", request.name, note, extra=on_every_rank())
        write_conditions(self.folder / request.name, conditions, request.sampling.fps)

    def write(self, made: GeneratedVideo) -> None:
        """Write the latents, the video as it is decoded, its contact sheet and its settings."""
        request = made.request

        def settings() -> dict[str, Any]:
            known = describe(self.models, made)
            task = {} if request.task is None else {"task": request.task.to_json()}
            return {"name": request.name, **known, "inputs": request.inputs.to_json(), **task, **self.run}

        kept = None
        if made.latents is not None:
            kept = write_latents(self.folder / request.name, made.latents, made.num_refs, settings())
        write_decoded(
            request.name, made.chunks(), request.sampling, self.folder, kept, settings, made.conditions
        )

    def store(self, request: GenerationRequest) -> WindowStore | None:
        """Return the store that keeps the windows of a long video for the next run, or None."""
        run, model = self.run.get("run"), self.run.get("model")
        if not request.sampling.is_windowed or run is None or model is None:
            return None
        parts = [*model["transformer"], model["vae"], model["text_encoder"]]
        paths = [path for part in parts for path in ([part] if isinstance(part, str) else part)]
        loras = [lora.path for lora in request.loras]
        precision = {key: run[key] for key in ("dtype", "vae_dtype", "quantize")}
        return WindowStore(self.folder / request.name, identity([*paths, *loras], precision))


def write_decoded(
    name: str,
    chunks: Iterable[Frames],
    sampling: SamplingConfig,
    folder: Path,
    kept: Path | None,
    settings: Callable[[], dict[str, Any]],
    conditions: Conditions | None = None,
) -> None:
    """Write the video as it is decoded, its contact sheet and its settings, and log its path and cost.

    `kept` is the file with the latents.
    """
    with nullcontext() if kept is None else with_resume_hint(kept):
        path = write_outcome(
            folder,
            name,
            chunks,
            num_frames=sampling.num_frames,
            fps=sampling.fps,
            conditions=conditions,
            settings=settings,
        )
    values = settings()
    cost = ", ".join(f"{phase} {seconds:g} s" for phase, seconds in values["seconds"].items())
    memory = values["peak_memory_gb"]
    if windows := values.get("windows"):
        psnr = windows["min_seam_psnr"]
        LOGGER.info(
            "  %s: %d windows; largest drift %.2f in Lab, largest change at a seam %.2f of the usual%s",
            name,
            len(windows["windows"]),
            windows["max_lab_drift"],
            windows["max_seam_jump"],
            "" if psnr is None else f", least PSNR of shared frames {psnr:.1f} dB",
            extra=on_every_rank(),
        )
    LOGGER.info("  %s (%s; peak memory %.2f GB)", path, cost, memory, extra=on_every_rank())


@contextmanager
def with_resume_hint(latents: Path) -> Iterator[None]:
    """Add advice on resuming from the latents to errors in the block."""
    hint = f"the latents are safe: run again with --from-latents {latents}"
    try:
        with explain_oom("", "while decoding", ""):
            yield
    except MindSpeedMMError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            hint += " --tiled always"
        raise error.advise(hint) from error.__cause__
