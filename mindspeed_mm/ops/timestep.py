"""The sinusoidal embedding of a timestep, in fp64 as the official code computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_mm.errors import DataError


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Embed timesteps [B] as fp32 [B, dim]: cos(t·w_k), then sin(t·w_k), with w_k = 10000^(-2k/dim).

    Raises DataError for a half-precision timestep: bf16 has only 294 distinct values for 1000 timesteps.
    """
    if timestep.dtype in (torch.bfloat16, torch.float16):
        raise DataError(
            f"timestep is {timestep.dtype}, in which neighbouring timesteps are equal",
            fix="pass it as float32",
        )
    device = timestep.device
    exact = device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")  # every CPU has fp64
    half = dim // 2
    rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=exact) / half)
    angles = torch.outer(timestep.to(exact, torch.float64), rates)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float().to(device)
