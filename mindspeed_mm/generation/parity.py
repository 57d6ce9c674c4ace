"""Where published projects differ from this one on purpose. Each function repeats one of them; all are off by default.

| key | project | what it repeats |
|-|-|-|
| diffsynth_noise | DiffSynth-Studio | with R references, the last R latent frames of the noise stand first |
| diffsynth_references | DiffSynth-Studio's VACE examples | references are stretched to the video's size with Pillow's bicubic filter |
| videoxfun_sigmas | VideoX-Fun's sampler "Flow" | Euler on sigmas that are shifted twice at their low end |
| wan_frames | Wan2.1's VACE (`keep_last=True`) | frames are spread over the whole source clip, its last one included |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mindspeed_mm.data.frames import FrameChoice
from mindspeed_mm.data.transforms import to_tensor
from mindspeed_mm.data.video import WHITE, flatten, read_image
from mindspeed_mm.errors import DataError
from mindspeed_mm.flow.schedule import shifted


def rotated_noise(noise: Tensor, num_refs: int) -> Tensor:
    """[16, R+F, h, w] with its last R frames first."""
    return torch.roll(noise, num_refs, dims=1)


def stretched_reference(image: str | Path | Image.Image | NDArray[np.uint8], height: int, width: int) -> Tensor:
    """An image of any aspect → [3, 1, H, W] in [-1, 1], stretched to fill it."""
    if isinstance(image, Image.Image):
        image = flatten(image, WHITE)
    pixels = image if isinstance(image, np.ndarray) else read_image(image, WHITE)
    stretched = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(np.array(stretched)[None])


def twice_shifted_sigmas(steps: int, shift: float) -> Tensor:
    """fp64 [N]: an even grid from 1 down to the shifted sigma of timestep 1, shifted again."""
    lowest = float(shifted(torch.tensor(0.001, dtype=torch.float32), shift))
    grid = np.linspace(1000.0, lowest * 1000, steps) / 1000
    return shifted(torch.from_numpy(grid), shift)


def frames_to_the_last(
    times: Sequence[float], *, duration: float, num_frames: int, fps: float, what: str
) -> FrameChoice:
    """`num_frames` moments from the first frame to the middle of the last one, and the first frame that is on screen at each.

    `times` are seconds at which frames start, `duration` when the last one ends. Raises DataError for a clip with fewer
    frames: the official code makes a shorter video of it.
    """
    most = (len(times) - 1) // 4 * 4 + 1
    if most < num_frames:
        raise DataError(
            f"{what} has {len(times)} frames; wan_frames makes a video of {most} frames of it, so set num_frames to {most}"
        )
    starts = np.array(times, dtype=np.float32)
    ends = np.array([*times[1:], duration], dtype=np.float32)
    last = np.stack([starts[-1], ends[-1]]).mean()
    moments = np.linspace(0.0, float(last), num_frames)
    shown = (moments[:, None] >= starts[None]) & (moments[:, None] <= ends[None])
    rate = num_frames / float(last) if last > 0 else fps
    return FrameChoice(tuple(np.argmax(shown, axis=1).tolist()), tuple(moments.tolist()), rate, "wan_frames")
