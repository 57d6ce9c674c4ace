"""Where published projects differ from this one on purpose. Each function repeats one of them; all are off by default.

| key | project | what it repeats |
|-|-|-|
| diffsynth_noise | DiffSynth-Studio | with R references, the last R latent frames of the noise stand first |
| diffsynth_references | DiffSynth-Studio's VACE examples | references are stretched to the video's size with Pillow's bicubic filter |
| videoxfun_sigmas | VideoX-Fun's sampler "Flow" | Euler on sigmas that are shifted twice at their low end |
| wan_frames | Wan2.1's VACE (`keep_last=True`) | frames are spread over the whole clip: `data.frames.spread_to_last` |
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mindspeed_mm.data.transforms import to_tensor
from mindspeed_mm.data.video import WHITE, flatten, read_image
from mindspeed_mm.flow.schedule import shifted


def rotated_noise(noise: Tensor, num_refs: int) -> Tensor:
    """[16, R+F, h, w] with its last R frames first."""
    return torch.roll(noise, num_refs, dims=1)


def stretched_reference(
    image: str | Path | Image.Image | NDArray[np.uint8], height: int, width: int
) -> Tensor:
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
