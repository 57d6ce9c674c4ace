"""Behaviour of other projects that deliberately differs from this one.

Each key reproduces one behaviour. All are off by default.

| key | project | what it reproduces |
|-|-|-|
| diffsynth_noise | DiffSynth-Studio | with R references, the last R latent frames of the noise come first |
| diffsynth_references | DiffSynth-Studio's VACE | stretched: `data.conditions.stretched_reference` |
| videoxfun_sigmas | VideoX-Fun's sampler "Flow" | Euler on sigmas shifted twice at their low end |
| wan_frames | Wan2.1's VACE (`keep_last=True`) | frames spread over the clip: `data.frames.spread_to_last` |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.flow.schedule import shifted


def rotated_noise(noise: Tensor, num_refs: int) -> Tensor:
    """Return noise [16, R+F, h, w] with its last R frames moved to the front."""
    return torch.roll(noise, num_refs, dims=1)


def twice_shifted_sigmas(steps: int, shift: float) -> Tensor:
    """Return fp64 sigmas [N]: an even grid from 1 down to the shifted sigma of timestep 1, shifted again."""
    lowest = float(shifted(torch.tensor(0.001, dtype=torch.float32), shift))
    grid = np.linspace(1000.0, lowest * 1000, steps) / 1000
    return shifted(torch.from_numpy(grid), shift)
