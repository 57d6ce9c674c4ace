"""From noise to a clip: the sigmas of each solver, and diffusers' schedulers fed with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.schedule import shifted
from mindspeed_mm.generation.parity import twice_shifted_sigmas
from mindspeed_mm.generation.sampling_config import SamplingConfig


class Stepper(Protocol):
    """The part of a diffusers scheduler that is used here."""

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """The sample one denoising step later, first in a tuple."""


class Solver:
    """The denoising steps of one video. It remembers earlier velocities: make a new one for each video."""

    def __init__(self, sampling: SamplingConfig) -> None:
        self.sigmas = sigma_table(sampling)  # [N+1] fp32, the last is 0
        self.timesteps = timestep_table(sampling)  # [N] fp32, as the model sees them
        self._scheduler = (
            Renoise(self.sigmas, self.timesteps, sampling.seed)
            if sampling.solver == "renoise"
            else make_scheduler(sampling.solver, self.sigmas, self.timesteps)
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, velocity: Tensor, index: int, sample: Tensor) -> Tensor:
        """The sample after denoising step `index`; steps are taken in order.

        Both tensors [B, 16, R+F, h, w] fp32.
        """
        return self._scheduler.step(velocity, self.timesteps[index], sample, return_dict=False)[0]


class Renoise:
    """The sampler of consistency models.

    Predict the clean sample x0 = x − σ·v, and add new noise: σ′·ε + (1 − σ′)·x0.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor, seed: int) -> None:
        self.sigmas, self.timesteps, self.seed = sigmas, timesteps, seed
        self._index = 0

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """The sample one denoising step later, first in a tuple.

        The noise depends on the seed and the step's number.
        """
        sigma, after = (float(value) for value in self.sigmas[self._index : self._index + 2])
        clean = sample - sigma * model_output
        self._index += 1
        if not after:
            return (clean,)
        noise = step_noise(sample.shape, self.seed, self._index).to(sample.device)
        return (after * noise + (1 - after) * clean,)


def step_noise(shape: Sequence[int], seed: int, step: int) -> Tensor:
    """fp32 standard normal numbers of (seed, step) from a CPU generator.

    Step 0 has the noise of `make_noise`.
    """
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    number = seed if step == 0 else int.from_bytes(digest[:7], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def sigma_table(sampling: SamplingConfig) -> Tensor:
    """fp32 [N+1]: falling sigmas, the last 0."""
    return torch.cat((_sigmas(sampling), torch.zeros(1, dtype=torch.float64))).float()


def timestep_table(sampling: SamplingConfig) -> Tensor:
    """fp32 [N]: 1000·sigma; whole numbers for the multistep solvers, as the published samplers round down."""
    if sampling.videoxfun_sigmas:
        return _sigmas(sampling).float() * 1000
    timesteps = _sigmas(sampling) * 1000
    return (timesteps if sampling.solver in ("euler", "renoise") else timesteps.floor()).float()


def _sigmas(sampling: SamplingConfig) -> Tensor:
    """fp64 [N]: the shifted grid of the solver.

    The published samplers make their grids with numpy, whose last bits are not torch's: whole timesteps would
    differ by one.
    """
    n = sampling.steps
    if sampling.timesteps is not None:
        return torch.tensor(sampling.timesteps, dtype=torch.float64) / 1000
    if sampling.videoxfun_sigmas:
        return twice_shifted_sigmas(n, sampling.shift)
    if sampling.solver in ("euler", "renoise"):
        return shifted(torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64)[:-1], sampling.shift)
    if sampling.solver == "unipc" and sampling.grid == "diffusers":
        # diffusers' own UniPC starts a hair below 1, where log(1 - sigma) is finite
        sigmas = shifted(_grid(1.0, 0.001, n), sampling.shift)
        sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0.0
        return sigmas
    start = _UNIPC_START if sampling.solver == "unipc" else 1.0
    return shifted(_grid(start, 0.0, n), sampling.shift)


_UNIPC_START = float(np.float32(0.999))  # the official scheduler keeps its first sigma in fp32


def _grid(start: float, end: float, steps: int) -> Tensor:
    return torch.from_numpy(np.linspace(start, end, steps + 1)[:-1].copy())


def make_noise(shape: Sequence[int], seed: int) -> Tensor:
    """fp32 [16, R+F, h, w] of standard normal numbers from a CPU generator.

    One seed, one video, on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, *shape, generator=generator)[0]


def make_scheduler(solver: str, sigmas: Tensor, timesteps: Tensor) -> Stepper:
    """diffusers' scheduler standing at its first step, with exactly these sigmas [N+1] and timesteps [N].

    Its own shift stays 1 and its tables are replaced after set_timesteps: passing `sigmas=` would shift a
    second time.
    """
    scheduler = _scheduler(solver)
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas = sigmas.clone()
    scheduler.timesteps = timesteps.clone()
    scheduler.num_inference_steps = len(timesteps)
    scheduler.set_begin_index(0)  # whole timesteps may repeat; never search for one
    stepper: Stepper = scheduler
    return stepper


def _scheduler(solver: str) -> Any:
    import diffusers

    flow = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
    }
    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler(**flow)
    if solver == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)
    if solver == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    raise ConfigError(f"got {solver!r}", where="solver", expected="one of unipc, dpm++, euler, renoise")
