"""Applies LoRAs temporarily, for one video.

LoRAs are either merged into the weights for the duration of the video, or added to the weights of each module
while it computes. Both give the same video as permanently merged weights: every sum is computed in fp32 and
rounded once to the weight's dtype, as in `merge_lora`. Adding supports offloaded, sharded and 8-bit weights,
and a different strength at each step. Merging has no cost per step, but needs host memory for the original
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.errors import ConfigError, WeightsError
from mindspeed_mm.generation.denoise import Step, StepHook
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.loras_config import LoraUse
from mindspeed_mm.generation.presets import phase_bounds
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.solver import timestep_table
from mindspeed_mm.limits import free_memory
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.lora.adapter import Adapter
from mindspeed_mm.models.lora.read import Expert
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.shapes import layout
from mindspeed_mm.models.weights import open_adapter
from mindspeed_mm.ops.quantized import exact_weight, product_dtype

logger = get_logger(__name__)
_EXPERTS: tuple[Expert, Expert] = ("high", "low")


@dataclass
class LoraSchedule:
    """The current denoising step, counted from 0, and its phase."""

    phases: Sequence[int] = ()  # phase of each step
    step: int = 0

    @property
    def phase(self) -> int:
        """The phase of the current step, counted from 0."""
        return self.phases[min(self.step, len(self.phases) - 1)] if self.phases else 0

    def advance(self, step: Step) -> None:
        """Advance to the next step. Used as a hook of the denoising loop."""
        self.step = step.index + 1


@dataclass(frozen=True)
class _Update:
    """The update of one weight by one LoRA, on the device."""

    use: LoraUse
    scale: float = 1.0
    down: Tensor | None = None
    up: Tensor | None = None
    diff: Tensor | None = None
    whole: Tensor | None = None

    def of(self, weight: Tensor, clock: LoraSchedule) -> Tensor | None:
        """Return the fp32 update at the current step, or None if the strength is 0."""
        strength = self.use.at(clock.step, clock.phase)
        if not strength:
            return None
        total = torch.zeros_like(weight)
        if self.whole is not None:
            total += strength * (self.whole.float() - weight)
        if self.diff is not None:
            total += strength * self.diff.float().view(weight.shape)
        if self.down is not None and self.up is not None:
            total += strength * (self.scale * (self.up.float() @ self.down.float())).view(weight.shape)
        return total


@dataclass
class _Patch:
    """Changes the weights of one module during its forward pass."""

    clock: LoraSchedule
    updates: Mapping[str, list[_Update]]  # name within the module → updates
    to_host: bool = False  # whether the original weights are kept on the host
    kept: list[tuple[Any, Tensor, torch.device]] = field(default_factory=list)

    def enter(self, module: nn.Module, _args: Any) -> None:
        for name, updates in self.updates.items():
            weight = getattr(module, name)
            exact, dtype = weight.data.float(), weight.dtype
            if name == "weight" and isinstance(module, nn.Linear):  # the weight may be quantized to 8 bits
                exact, dtype = exact_weight(module), product_dtype(module)
            parts = [part for update in updates if (part := update.of(exact, self.clock)) is not None]
            if parts:
                former = weight.data.to("cpu") if self.to_host else weight.data
                self.kept.append((weight, former, weight.device))
                weight.data = (exact + sum(parts[1:], parts[0])).to(dtype)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        while self.kept:
            weight, data, device = self.kept.pop()
            weight.data = data.to(device)


@contextmanager
def applied(
    experts: Experts, uses: Sequence[LoraUse], sampling: SamplingConfig | None = None
) -> Iterator[Sequence[StepHook]]:
    """Apply LoRAs to the models within the block, then restore the original weights exactly.

    Yields the hooks to call after each denoising step; without LoRAs, there are none. Raises ConfigError, and
    WeightsError for a LoRA that does not fit.
    """
    clock = LoraSchedule(_phases(sampling, len(experts.models)))
    handles: list[Any] = []
    patches: list[_Patch] = []
    try:
        opened = open_loras(experts.config, uses, len(experts.models)) if any_strength(uses) else []
        changes = [
            (owner, updates)
            for model, adapters in zip(experts.models, opened, strict=False)
            for owner, updates in _updates(model, adapters, experts.device).items()
        ]
        merges = bool(changes) and _can_merge(experts, uses, changes)
        for owner, updates in changes:
            patch = _Patch(clock, updates, to_host=merges and experts.device.type != "cpu")
            patches.append(patch)
            if merges:
                patch.enter(owner, None)
                continue
            handles.append(owner.register_forward_pre_hook(patch.enter))
            handles.append(owner.register_forward_hook(patch.leave, prepend=True))
        yield (clock.advance,) if changes else ()
    finally:
        for handle in handles:
            handle.remove()
        for patch in patches:  # undo merged LoRAs, and those of a forward pass that an error interrupted
            patch.leave(nn.Identity(), None, None)


_Changes = Mapping[str, list[_Update]]


def _updates(
    model: nn.Module, adapters: Sequence[tuple[LoraUse, Adapter]], device: torch.device
) -> dict[nn.Module, _Changes]:
    """Map each module and each weight name within it to its updates."""
    found: dict[nn.Module, dict[str, list[_Update]]] = {}
    for use, adapter in adapters:
        for name in adapter.names:
            module, _, last = name.rpartition(".")
            update = _load(use, adapter, name, device)
            found.setdefault(model.get_submodule(module), {}).setdefault(last, []).append(update)
    return dict(found)


def _can_merge(
    experts: Experts, uses: Sequence[LoraUse], changes: Sequence[tuple[nn.Module, _Changes]]
) -> bool:
    """Return whether the LoRAs can be merged.

    Each strength must be a single number, the weights must not be sharded, and the host must have memory for
    the original weights.
    """
    weights = [getattr(owner, name) for owner, updates in changes for name in updates]
    is_whole = experts.mode == "none" and not any(
        isinstance(weight, DTensor) or not weight.is_floating_point() for weight in weights
    )
    needed = sum(weight.numel() * weight.element_size() for weight in weights)
    merges = is_whole and all(len(use.strengths) == 1 for use in uses) and needed <= free_memory() // 2
    how = "merged for this video" if merges else "added in every pass"
    logger.info(f"LoRAs are {how}: {len(weights)} weights, {needed / 1e9:.2f} GB", extra=once())
    return merges


def _phases(sampling: SamplingConfig | None, experts: int) -> list[int]:
    if sampling is None:
        return []
    bounds = phase_bounds(sampling, experts)
    return [sum(float(timestep) < bound for bound in bounds) for timestep in timestep_table(sampling)]


def open_loras(
    config: VaceConfig, uses: Sequence[LoraUse], experts: int
) -> list[list[tuple[LoraUse, Adapter]]]:
    """Open the LoRAs of each model, reading only their headers.

    Raises ConfigError, and WeightsError for a LoRA that does not fit.
    """
    shapes = layout(config)
    found: list[list[tuple[LoraUse, Adapter]]] = [[] for _ in range(experts)]
    for number, use in enumerate(uses):
        if experts == 1 and use.on != "both":
            raise ConfigError(
                f"got {use.on}, but model.transformer names one model",
                where=f"loras[{number}].on",
                fix="remove it",
            )
        total = 0
        for index, models in enumerate(found):
            if experts == 2 and use.on not in ("both", _EXPERTS[index]):
                continue
            adapter = open_adapter(use.path, shapes, expert=_EXPERTS[index] if experts == 2 else None)
            logger.info(f"{adapter.description}; strength {use.strength}", extra=once())
            models.append((use, adapter))
            total += adapter.count
        if not total:
            raise WeightsError(
                f"has no weights for the expert {use.on}", where=use.path, fix="set on to the other expert"
            )
    return found


def any_strength(uses: Sequence[LoraUse]) -> bool:
    """Return whether any LoRA has a nonzero strength at any step."""
    return any(any(use.strengths) for use in uses)


def _load(use: LoraUse, adapter: Adapter, name: str, device: torch.device) -> _Update:
    pair = adapter.pairs.get(name)
    tensors = {
        "down": None if pair is None else pair.down.read().flatten(1),
        "up": None if pair is None else pair.up.read().flatten(1),
        "diff": adapter.diffs[name].read() if name in adapter.diffs else None,
        "whole": adapter.whole[name].read() if name in adapter.whole else None,
    }
    if any(tensor is not None and not bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise WeightsError(
            f"its update of {name} is NaN or infinite", where=adapter.path, fix="use another file"
        )
    moved = {key: None if tensor is None else tensor.to(device) for key, tensor in tensors.items()}
    return _Update(use, 1.0 if pair is None else pair.scale, **moved)
