"""The interface for changing a model after it is built on the meta device and before its weights load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from mindspeed_mm.models.lora.saved import DOWN, UP
from mindspeed_mm.models.source import WeightsSource

_OF_A_LORA = (DOWN.removesuffix(".weight"), UP.removesuffix(".weight"))


class ModuleTransform(ABC):
    """One change to a model, such as an adapter.

    Base weights keep their names, so checkpoints of the base still load.
    """

    is_adapter: ClassVar[bool] = False  # selects the trainable weights; without an adapter, `trainable` does
    comes_last: ClassVar[bool] = False  # applied after `Freeze`, wherever it is listed

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change `model`, which is on the meta device, in place. Raises ConfigError if it does not fit."""

    def change_source(self, source: WeightsSource) -> WeightsSource:
        """Return the source of the model's weights, given that of its base. Called after `apply`."""
        return source

    def is_trainable(self, name: str) -> bool:
        """Return whether this transform makes the weight `name` trainable."""
        return False

    def adds(self, name: str) -> bool:
        """Return whether this transform adds the weight `name`, which checkpoints of the base lack."""
        return False

    def initial_weight(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """Return the initial fp32 value of an added weight. It depends only on these arguments."""
        raise NotImplementedError(f"{type(self).__name__} adds no weights")

    def merge(self, model: nn.Module) -> None:  # noqa: B027  # most transforms have nothing to fold
        """Fold the added weights into the base weights where possible.

        The model then computes the same without them.
        """


def base_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Map the names of all linear layers to the layers, without LoRA matrices."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(_OF_A_LORA)
    }
