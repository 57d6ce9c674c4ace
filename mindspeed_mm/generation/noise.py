"""Draws the noise of a video on the CPU, so that a seed gives the same noise on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def make_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Return standard normal noise, fp32 [16, R+F, h, w], for `shape` (R+F, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, *shape, generator=generator)[0]


def step_noise(shape: Sequence[int], seed: int, step: int) -> Tensor:
    """Return standard normal noise for (seed, step), fp32.

    Step 0 gives the noise of `make_noise`.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    number = seed if step == 0 else int.from_bytes(digest[:7], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))
