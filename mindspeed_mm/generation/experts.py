"""Selects the transformer that predicts at a timestep, and offloads idle weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.generation.config import TOKEN_BYTES, WORKSPACE, Offload
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.vace import VaceTransformer

LOGGER = get_logger(__name__)


class Experts:
    """One transformer, or a high-noise and a low-noise one. Only the active one needs to be on the device."""

    def __init__(
        self,
        models: Sequence[VaceTransformer],
        accelerator: Accelerator,
        offload: Offload = "none",
        *,
        placed: bool = False,
        dtype: torch.dtype | None = None,
        count: int | None = None,
    ) -> None:
        """Create the experts from [model] or [high, low].

        With `placed`, the models are already on their devices (sharded or in training) and are never moved.
        `dtype` is the dtype of matrix products, if it differs from that of the weights (fp32 master weights
        in training). `count` is the total number of weights, if this process has only some of them (pipeline
        stages).
        """
        if len(models) not in (1, 2):
            raise WeightsError(f"got {len(models)} transformers", expected="one, or [high, low]")
        if any(model.config != models[0].config for model in models):
            raise WeightsError("the two experts have different sizes", expected="the two halves of one model")
        self.models = tuple(models)
        self.mode: Offload = "none" if placed else _affordable(models, accelerator, offload)
        self._offloaders = (
            [] if placed else [_offloader(model, accelerator.device, self.mode) for model in models]
        )
        self._active: int | None = None
        self._accelerator = accelerator
        self._count = count or sum(weight.numel() for model in models for weight in model.parameters())
        self._dtype = dtype or next(models[0].blocks.parameters()).dtype
        if self.mode == "none":
            for offloader in self._offloaders:
                offloader.onload()

    @property
    def config(self) -> VaceConfig:
        """The sizes of the model, which are the same for both experts."""
        return self.models[0].config

    @property
    def device(self) -> torch.device:
        """The device that the experts compute on."""
        return self._accelerator.device

    def index_at(self, timestep: float, boundary: float) -> int:
        """Return the index of the expert for `timestep`: 1 (low noise) below 1000·boundary, else 0."""
        return int(len(self.models) == 2 and timestep < 1000 * boundary)

    def at(self, timestep: float, sampling: SamplingConfig) -> tuple[VaceTransformer, float]:
        """Return the model for `timestep`, moved to the device, and its guidance scale."""
        index = self.index_at(timestep, sampling.boundary)
        self._activate(index)
        scale = (sampling.guidance_scale, sampling.guidance_scale_2)[index]
        return self.models[index], 1.0 if timestep < sampling.guidance_end else scale

    def fits_batched_cfg(self, tokens: int) -> bool:
        """Return whether one pass over both prompts fits on the device in addition to the weights.

        If it does not, the prompts are processed sequentially. The decision depends only on sizes, so that
        results are bitwise identical during and after training, and with and without offloading.
        """
        activations = 2 * TOKEN_BYTES * tokens * self.config.trunk.hidden_size
        return self._count * self._dtype.itemsize + activations <= 0.8 * self._accelerator.total_memory()

    def offload(self) -> None:
        """Move the active model off the device, unless the models stay there."""
        if self.mode != "none" and self._active is not None:
            self._offloaders[self._active].offload()
            self._active = None

    def _activate(self, index: int) -> None:
        if self.mode == "none" or index == self._active:
            return
        self.offload()
        self._offloaders[index].onload()
        self._active = index


def _affordable(models: Sequence[nn.Module], accelerator: Accelerator, offload: Offload) -> Offload:
    """Return `offload`, or `model` instead of `none` if two experts do not fit on the device together."""
    needed = sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
    total = accelerator.total_memory()
    if offload != "none" or len(models) == 1 or accelerator.kind == "cpu" or needed + WORKSPACE <= total:
        return offload
    LOGGER.info(
        (
            "the two experts take %.0f GB of the device's %.0f: only the active one is kept there (offload "
            "model)"
        ),
        needed / 1e9,
        total / 1e9,
    )
    return "model"


class OffloadedModule:
    """A module whose weights are kept on the host and copied to the device when needed.

    The weights are read-only, so they are never copied back.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, pin: bool = False) -> None:
        self.device = device
        tensors = [*module.parameters(), *module.buffers()]
        can_pin = pin and device.type != "cpu"
        self._host = [(tensor, tensor.data.pin_memory() if can_pin else tensor.data) for tensor in tensors]

    def onload(self) -> None:
        """Copy the weights to the device."""
        for tensor, weight in self._host:
            tensor.data = weight.to(self.device, non_blocking=True)

    def offload(self) -> None:
        """Use the weights on the host again."""
        for tensor, weight in self._host:
            tensor.data = weight

    def used_by(self, stream: Any) -> None:
        """Record for the allocator that `stream` uses weights that another stream copied."""
        for tensor, _ in self._host:
            tensor.data.record_stream(stream)


class BlockOffloader:
    """A transformer whose blocks are copied to the device one at a time.

    The next block is copied while the current one computes.
    """

    def __init__(self, model: VaceTransformer, device: torch.device) -> None:
        blocks = model.blocks_in_order()
        inside = {id(weight) for block in blocks for weight in block.parameters()}
        rest = nn.ParameterList(weight for weight in model.parameters() if id(weight) not in inside)
        self._rest = OffloadedModule(rest, device)
        self._blocks = [OffloadedModule(block, device, pin=True) for block in blocks]
        self._onloaded: set[int] = set()
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _module, _args, index=index: self._enter(index))
            block.register_forward_hook(lambda _module, _args, _output, index=index: self._exit(index))

    def onload(self) -> None:
        """Copy everything except the blocks to the device."""
        self._rest.onload()

    def offload(self) -> None:
        """Move everything off the device."""
        for index in sorted(self._onloaded):
            self._blocks[index].offload()
        self._onloaded.clear()
        self._rest.offload()

    def _enter(self, index: int) -> None:
        self._fetch(index)
        if self._stream is not None:
            current = torch.accelerator.current_stream(self._blocks[index].device)
            current.wait_stream(self._stream)
            self._blocks[index].used_by(current)
            self._fetch((index + 1) % len(self._blocks))

    def _exit(self, index: int) -> None:
        self._blocks[index].offload()
        self._onloaded.discard(index)

    def _fetch(self, index: int) -> None:
        if index in self._onloaded:
            return
        self._onloaded.add(index)
        if self._stream is None:
            self._blocks[index].onload()
            return
        with self._stream:
            self._blocks[index].onload()


def _offloader(
    model: VaceTransformer, device: torch.device, offload: Offload
) -> OffloadedModule | BlockOffloader:
    return BlockOffloader(model, device) if offload == "block" else OffloadedModule(model, device)
