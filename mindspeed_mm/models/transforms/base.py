"""What may be changed in a model between building it on the meta device and loading its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.registry import did_you_mean


class ModuleTransform(ABC):
    """One change, such as an adapter. Base weights keep their names, so any checkpoint of the base still loads."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change `model`, which is on the meta device, in place. Raises ConfigError when it does not fit."""

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
        """Fold what it added into the base weights, where it can: the model then computes the same without it."""


def matching(patterns: Sequence[str], names: Iterable[str], where: str) -> list[str]:
    """The names that end in one of `patterns` at a dot, in their own order; `*` stands for any text.

    `q` matches `blocks.0.self_attn.q` but not `norm_q`. Raises ConfigError for a pattern that matches nothing.
    """
    known = list(names)
    hits = {pattern: {name for name in known if ends_in(name, pattern)} for pattern in patterns}
    for pattern, found in hits.items():
        if not found:
            endings = sorted({part for name in known for part in (name, name.rpartition(".")[2])})
            raise ConfigError(f"{pattern!r} matches no module{did_you_mean(pattern, endings)}", where=where)
    return [name for name in known if any(name in found for found in hits.values())]


def ends_in(name: str, pattern: str) -> bool:
    """Whether `name` is `pattern`, or ends in it at a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
