"""Writes the output files of a generation.

They are NAME.mp4, NAME.png (contact sheet), NAME.json (all settings), and NAME/ with conditions and latents.
Each file is written atomically.
"""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.data.sheet import Strip, draw_sheet, spread
from mindspeed_mm.data.video_writer import write_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import atomic_path, write_json
from mindspeed_mm.generation.embedded import embedded
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.geometry import WAN

Frames = NDArray[np.uint8]  # [T, H, W, 3]
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


def picture_frames(pixels: Tensor) -> Frames:
    """Convert pixels [3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    frames = ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).byte()
    return frames.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def clip_bytes(clip: Tensor | Frames, chosen: Sequence[int] | None = None) -> Frames:
    """Return a clip of `Conditions` or `ReadConditions`, or its `chosen` frames, as uint8 [T, H, W, 3]."""
    if isinstance(clip, Tensor):
        return picture_frames(clip if chosen is None else clip[:, list(chosen)])
    return clip if chosen is None else clip[list(chosen)]


def mask_bytes(mask: Tensor | Frames, chosen: Sequence[int] | None = None) -> Frames:
    """Return a mask, or its `chosen` frames, as uint8 [T, H, W]. White means generate."""
    if isinstance(mask, Tensor):
        return clip_bytes(mask.expand(3, -1, -1, -1) * 2 - 1, chosen)[..., 0]
    return mask if chosen is None else mask[list(chosen)]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect the results."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("mindspeed-mm-vace", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree" if package == "mindspeed-mm-vace" else "absent"
    return found


def check_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder` has about `needed` bytes free. The folder need not exist.

    Raises DataError.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DataError(
            f"disk has {free / 1e6:.3g} MB free, but about {needed / 1e6:.3g} MB are needed",
            where=folder,
            fix="free disk space or choose another output_path",
        )


def bytes_of(sampling: SamplingConfig, num_refs: int) -> int:
    """Estimate the disk space of one video: latents, the video and its conditions as mp4, and the sheet."""
    frames, height, width = sampling.num_frames, sampling.height, sampling.width
    latents = 4 * WAN.channels * math.prod(WAN.grid(frames, height, width, num_refs))
    return latents + 3 * frames * height * width // 10 + _SHEET_BYTES


@contextmanager
def explain_disk(path: Path) -> Iterator[Path]:
    """Convert an OSError in the block to a one-line DataError about `path`."""
    try:
        yield path
    except OSError as error:
        problem = f"cannot be written: {error.strerror or error}"
        raise DataError(problem, where=path, fix="free disk space or choose another output_path") from None
