"""Global random states of a rank.

Timesteps and noise do not use them; they are keyed by seed and sample index.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.accelerator import Accelerator


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch (all devices), differently on each rank."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def rng_state(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the states of this rank's torch generators as uint8 tensors on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if accelerator.kind != "cpu":
        state["device"] = torch.get_device_module(accelerator.device).get_rng_state(accelerator.device)
    return state


def set_rng_state(accelerator: Accelerator, state: dict[str, Tensor]) -> None:
    """Restore the states from `rng_state`. Ignores the state of another device type."""
    torch.set_rng_state(state["cpu"])
    if "device" in state and accelerator.kind != "cpu":
        torch.get_device_module(accelerator.device).set_rng_state(state["device"], accelerator.device)
