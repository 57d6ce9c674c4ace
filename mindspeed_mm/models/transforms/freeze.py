"""Which weights train, and the dtype of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.transforms.base import ModuleTransform


@dataclass(frozen=True)
class Freeze(ModuleTransform):
    """Keep trained weights and `fp32_modules` in fp32, freeze the rest and hold it in `dtype`.

    Applied after all other transforms, except those with `comes_last`.
    """

    is_trained: Callable[[str], bool]  # by the weight's name
    dtype: torch.dtype
    fp32_modules: tuple[str, ...] = ()  # children of the root
    origin: str = "predictor.trainable"  # the setting that decides, for error messages

    def is_trainable(self, name: str) -> bool:
        """Return whether the weight `name` is trainable."""
        return self.is_trained(name)

    def apply(self, model: nn.Module) -> None:
        """Set `requires_grad` and the dtype of every weight. Raises ConfigError if none is left to train."""
        for name, parameter in model.named_parameters():
            kept = self.is_trainable(name)
            parameter.requires_grad_(kept)
            exact = kept or name.split(".")[0] in self.fp32_modules
            parameter.data = parameter.data.to(torch.float32 if exact else self.dtype)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("leaves nothing to train: the model has no such part", where=self.origin)
