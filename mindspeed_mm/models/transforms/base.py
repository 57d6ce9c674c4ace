"""What may be changed in a model between building it on the meta device and loading its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from mindspeed_mm.models.lora.saved import DOWN, UP
from mindspeed_mm.models.source import WeightsSource

_OF_A_LORA = (DOWN.removesuffix(".weight"), UP.removesuffix(".weight"))


class ModuleTransform(ABC):
    """One change, such as an adapter.

    Base weights keep their names, so any checkpoint of the base still loads.
    """

    is_adapter: ClassVar[bool] = False  # what it trains is all that trains; without one, `trainable` decides
    comes_last: ClassVar[bool] = False  # after what freezes, at any place in the list

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change `model`, which is on the meta device, in place. Raises ConfigError when it does not fit."""

    def change_source(self, source: WeightsSource) -> WeightsSource:
        """What the model's weights are read from, given what its base is read from. Called after `apply`."""
        return source

    def trains(self, name: str) -> bool:
        """Whether the weight `name` trains because of this transform."""
        return False

    def adds(self, name: str) -> bool:
        """Whether the weight `name` is this transform's own, which no checkpoint of the base has."""
        return False

    def initial_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The fp32 value that a weight which it adds starts from: a function of its arguments alone."""
        raise NotImplementedError(f"{type(self).__name__} adds no weights")

    def merge(self, model: nn.Module) -> None:  # noqa: B027  # most have nothing to fold
        """Fold what it added into the base weights, where it can.

        The model then computes the same without it.
        """


def base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of a model by its name, without the matrices of LoRAs."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(_OF_A_LORA)
    }
