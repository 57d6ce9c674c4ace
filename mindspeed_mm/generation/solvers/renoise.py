"""`renoise`: the sampler of consistency models, on the grid of `euler` or at given timesteps."""

from __future__ import annotations

from torch import Tensor

from mindspeed_mm.generation.noise import step_noise


class Renoise:
    """Predicts the clean sample x0 = x − σ·v and adds fresh noise: σ′·ε + (1 − σ′)·x0."""

    def __init__(self, sigmas: Tensor, timesteps: Tensor, seed: int) -> None:
        self.sigmas, self.timesteps, self.seed = sigmas, timesteps, seed
        self._index = 0

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool
    ) -> tuple[Tensor, ...]:
        """Return the sample after one denoising step, as the first element of a tuple.

        The noise depends only on the seed and the step number.
        """
        sigma, after = (float(value) for value in self.sigmas[self._index : self._index + 2])
        clean = sample - sigma * model_output
        self._index += 1
        if not after:
            return (clean,)
        noise = step_noise(sample.shape, self.seed, self._index).to(sample.device)
        return (after * noise + (1 - after) * clean,)
