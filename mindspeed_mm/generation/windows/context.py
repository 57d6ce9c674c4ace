"""Context windows: the whole video is denoised together, but the model sees one window at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.generation.result import PredictFn, Prediction
from mindspeed_mm.generation.windows.ramp import ramp
from mindspeed_mm.generation.windows_config import Window, WindowKeys


@dataclass(frozen=True)
class Part:
    """The latent frames that one window sees, and the weight of its velocity at each."""

    indices: Tensor  # [r+f] int64, references first
    weights: Tensor  # [r+f] fp32


class ContextWindows:
    """A `PredictFn` for latents [1, 16, R+F, h, w] that averages the velocities of the windows.

    Where two windows overlap, one fades linearly into the other.
    """

    def __init__(self, parts: Sequence[Part], predictors: Sequence[PredictFn]) -> None:
        self.parts, self.predictors = parts, predictors

    def __call__(self, latents: Tensor, timestep: Tensor) -> Prediction:
        """Return the velocity of all frames at `timestep` [1]."""
        velocity = torch.zeros_like(latents)
        total = torch.zeros(latents.shape[2], device=latents.device)
        outputs: list[Tensor] = []
        model = None
        for part, predict in zip(self.parts, self.predictors, strict=True):
            indices, weights = part.indices.to(latents.device), part.weights.to(latents.device)
            found = predict(latents[:, :, indices], timestep)
            velocity.index_add_(2, indices, found.velocity * weights[:, None, None])
            total.index_add_(0, indices, weights)
            outputs.extend(found.outputs)
            model = found.model
        assert model is not None
        velocity /= total.clamp(min=1e-6)[:, None, None]
        return Prediction(velocity=velocity, outputs=outputs, model=model)


def make_parts(keys: WindowKeys, num_refs: int) -> list[Part]:
    """Return one part per window. References seen by several windows get the mean of their velocities."""
    windows = keys.windows
    frames = window_weights(windows)
    parts = []
    for window, weights in zip(windows, frames, strict=True):
        references = references_of(keys, window, num_refs)
        indices = [*references, *(num_refs + frame for frame in window.latents)]
        parts.append(Part(torch.tensor(indices), torch.cat([torch.ones(len(references)), weights])))
    return parts


def window_weights(windows: Sequence[Window]) -> list[Tensor]:
    """Return fp32 [f] for each window: linear ramps on latent frames shared with its neighbours, else 1.

    At every latent frame, the weights of all windows sum to 1.
    """
    spans = [window.latents for window in windows]
    found = []
    total = torch.zeros(spans[-1].stop)
    for index, span in enumerate(spans):
        weights = torch.ones(len(span))
        if index and (shared := max(0, spans[index - 1].stop - span.start)):
            weights[:shared] = torch.from_numpy(ramp(shared))
        if index + 1 < len(spans) and (shared := max(0, span.stop - spans[index + 1].start)):
            weights[-shared:] = torch.minimum(weights[-shared:], 1 - torch.from_numpy(ramp(shared)))
        found.append(weights)
        total[span.start : span.stop] += weights
    return [weights / total[span.start : span.stop] for span, weights in zip(spans, found, strict=True)]


def references_of(keys: WindowKeys, window: Window, num_refs: int) -> tuple[int, ...]:
    """Return the indices of the references that a window sees."""
    if keys.window_references is None:
        return tuple(range(num_refs))
    rows = keys.window_references
    return rows[min(window.index, len(rows) - 1)]


def of_windows(
    make: Callable[[int, Tensor], PredictFn], vace_context: Tensor, parts: Sequence[Part]
) -> ContextWindows:
    """Return the predictor for vace_context [1, 96, R+F, h, w]. `make` builds that of one window."""
    return ContextWindows(
        parts,
        [
            make(index, vace_context[:, :, part.indices.to(vace_context.device)])
            for index, part in enumerate(parts)
        ],
    )
