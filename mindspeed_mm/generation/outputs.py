"""Writes the output files of a generation.

They are NAME.mp4, NAME.png (contact sheet), NAME.json (all settings), and NAME/ with conditions and latents.
Each file is written atomically.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.data.images import Frames
from mindspeed_mm.data.sheet import Strip, draw_sheet, spread
from mindspeed_mm.data.video_writer import clip_bytes, mask_bytes, picture_frames, write_video
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.files import atomic_path, write_json
from mindspeed_mm.generation.embedded import embedded
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.result import GeneratedVideo
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.stages import explain_oom
from mindspeed_mm.generation.stored import write_latents
from mindspeed_mm.generation.windows.store import WindowStore, identity
from mindspeed_mm.geometry import WAN
from mindspeed_mm.log import get_logger, on_every_rank
from mindspeed_mm.outputs import explain_disk

LOGGER = get_logger(__name__)
Settings = dict[str, Any]
_COLUMNS = 8
_SHEET_BYTES = 300_000
_PHASES = {
    "text": "text",
    "load": "reading weights",
    "vae_encode": "VAE encode",
    "denoise": "denoising",
    "step": "one step",
    "vae_decode": "VAE decode",
}


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
            return {"name": request.name, **known, "inputs": request.inputs_to_json(), **task, **self.run}

        kept = None
        if made.latents is not None:
            kept = write_latents(self.folder / request.name, made.latents, made.num_refs, settings())
        write_decoded(
            request.name, made.chunks(), request.sampling, self.folder, kept, settings, made.conditions
        )

    def open_store(self, request: GenerationRequest) -> WindowStore | None:
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


def write_conditions(folder: Path, conditions: Conditions, fps: float) -> None:
    """Write the inputs of the model to `folder`: src_video.mp4, src_mask.mp4, reference_0.png …."""
    with explain_disk(folder):
        if conditions.src_video is not None:
            write_video(folder / "src_video.mp4", clip_bytes(conditions.src_video), fps)
        if conditions.src_mask is not None:
            masks = mask_bytes(conditions.src_mask)
            write_video(folder / "src_mask.mp4", (np.stack([mask] * 3, axis=-1) for mask in masks), fps)
        for number, reference in enumerate(conditions.src_ref_images):
            with atomic_path(folder / f"reference_{number}.png") as draft:
                Image.fromarray(picture_frames(reference)[0]).save(draft, format="PNG")


def write_outcome(
    folder: Path,
    name: str,
    chunks: Iterable[Frames],
    *,
    num_frames: int,
    fps: float,
    conditions: Conditions | None,
    settings: Callable[[], Settings],
) -> Path:
    """Write NAME.mp4 as its frames arrive, then the sheet and the settings. Returns the video's path."""
    path = folder / f"{name}.mp4"
    kept: dict[int, Frames] = {}
    wanted = set(spread(num_frames, _COLUMNS))
    with explain_disk(path):
        write_video(path, _watched(chunks, kept, wanted), fps, comment=embedded(settings()))
    said = settings()
    sheet = draw_result(name, [kept[index] for index in sorted(kept)], sorted(kept), conditions, said)
    with explain_disk(folder / f"{name}.png") as picture, atomic_path(picture) as draft:
        sheet.save(draft, format="PNG")
    with explain_disk(folder / f"{name}.json") as text:
        write_json(text, said)
    return path


def _watched(chunks: Iterable[Frames], kept: dict[int, Frames], wanted: set[int]) -> Iterator[Frames]:
    """Yield each frame [H, W, 3] in order, and keep the `wanted` ones in `kept` for the sheet."""
    number = 0
    for chunk in chunks:
        for frame in chunk:
            if number in wanted:
                kept[number] = frame.copy()
            yield frame
            number += 1


def draw_result(
    name: str,
    pictures: Sequence[Frames],
    indices: Sequence[int],
    conditions: Conditions | None,
    settings: Settings,
) -> Image.Image:
    """Draw the contact sheet with the request, the inputs of the model and the result."""
    fps = float(settings["sampling"]["fps"])
    labels = [f"frame {index} · {index / fps:.2f} s" for index in indices]
    strips = [] if conditions is None else condition_strips(conditions, indices)
    strips.append(Strip(name="output", pictures=pictures, labels=labels, note="result"))
    return draw_sheet(name, strips, facts=_facts(settings), caption=settings["prompt"], columns=_COLUMNS)


def condition_strips(conditions: Conditions, indices: Sequence[int]) -> list[Strip]:
    """Return the strips of the conditions: the references, and the frames `indices` of video and mask."""
    strips = []
    chosen = list(indices)
    if conditions.src_ref_images:
        pictures = [picture_frames(reference)[0] for reference in conditions.src_ref_images]
        strips.append(
            Strip(
                name="references",
                pictures=pictures,
                note="must appear",
                labels=[f"image {i}" for i in range(len(pictures))],
            )
        )
    if conditions.src_video is not None:
        note = "clip to edit" if conditions.src_mask is not None else "control clip"
        pictures = list(clip_bytes(conditions.src_video, chosen))
        strips.append(Strip(name="src_video", pictures=pictures, note=note))
    if conditions.src_mask is not None:
        masks = [np.stack([mask] * 3, axis=-1) for mask in mask_bytes(conditions.src_mask, chosen)]
        strips.append(
            Strip(name="src_mask", pictures=masks, note="white = generate, black = keep", crisp=True)
        )
    return strips


def _facts(settings: Settings) -> list[str]:
    s = settings["sampling"]
    guidance = f"guidance {s['guidance_scale']:g}"
    if s["guidance_scale_2"] != s["guidance_scale"]:
        guidance += f" / {s['guidance_scale_2']:g}"
    facts = [
        f"{s['width']}x{s['height']} · {s['num_frames']} frames · {s['fps']:g} fps · {s['solver']}, "
        f"{s['steps']} steps, shift {s['shift']:g} · {guidance} · context scale "
        f"{_scale(s['context_scale'])} · seed {s['seed']}"
    ]
    seconds = settings.get("seconds", {})
    cost = " · ".join(f"{word} {seconds[phase]:.3g} s" for phase, word in _PHASES.items() if phase in seconds)
    if cost:
        facts.append(f"{settings['device']} · {cost} · peak memory {settings['peak_memory_gb']:.2f} GB")
    return [*facts, *settings.get("notes", [])]


def _scale(scale: float | Sequence[float]) -> str:
    return f"{scale:g}" if isinstance(scale, (int, float)) else ", ".join(f"{value:g}" for value in scale)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("mindspeed-mm-vace", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree" if package == "mindspeed-mm-vace" else "absent"
    return found


def bytes_of(sampling: SamplingConfig, num_refs: int) -> int:
    """Estimate the disk space of one video: latents, the video and its conditions as mp4, and the sheet."""
    frames, height, width = sampling.num_frames, sampling.height, sampling.width
    latents = 4 * WAN.channels * math.prod(WAN.grid(frames, height, width, num_refs))
    return latents + 3 * frames * height * width // 10 + _SHEET_BYTES
