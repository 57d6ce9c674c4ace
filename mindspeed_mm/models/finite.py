"""Check weights, latents and pixels for NaN and Inf, with one reduction per tensor on its own device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.containers.tensors import TensorFile

_SHOWN = 5


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite.

    The sum is not finite if any element is not. As it may also overflow, the elements are then checked too.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # fp8 has no sum
        tensor = tensor.to(torch.float32)
    if math.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def count_nonfinite(tensor: Tensor) -> int:
    """Return the number of elements that are NaN or infinite."""
    return 0 if is_finite(tensor) else int(torch.isfinite(tensor.float()).logical_not().sum())


class FiniteWeights:
    """Collects the weights that contain NaN or Inf while a model is loaded."""

    def __init__(self, where: object) -> None:
        self.where = where
        self._bad: dict[str, str] = {}

    def check(self, name: str, weight: Tensor) -> None:
        """Check one weight, or this rank's part of it."""
        self.note(name, count_nonfinite(weight), weight.numel())

    def note(self, name: str, bad: int, values: int) -> None:
        """Record that `bad` of the `values` elements of a weight are not finite."""
        if bad:
            self._bad[name] = f"{name} ({bad} of {values} values)"

    def read(self, name: str, tensor: TensorFile, dtype: torch.dtype) -> Tensor:
        """Read a weight from a file in `dtype`, and check it."""
        bad = 0

        def count(part: Tensor) -> None:
            nonlocal bad
            bad += count_nonfinite(part)

        found = tensor.read_as(dtype, count)
        self.note(name, bad, found.numel())
        return found

    @property
    def problem(self) -> str:
        """Describe the weights that are not finite; "" if all are."""
        bad = self._bad
        verb = "weights contain" if len(bad) > 1 else "weight contains"
        return f"{len(bad)} {verb} NaN or Inf: {_listed(bad.values())}" if bad else ""

    def raise_if_nonfinite(self, fix: str = "download the file again, or load an earlier checkpoint") -> None:
        """Raise WeightsError that names the weights that are not finite, if there are any."""
        if problem := self.problem:
            raise WeightsError(problem, where=str(self.where), fix=fix)


def check_weights(where: object, weights: Mapping[str, Tensor]) -> None:
    """Check weights for NaN and Inf. Raises WeightsError with the names and counts."""
    finite = FiniteWeights(where)
    for name, weight in weights.items():
        finite.check(name, weight)
    finite.raise_if_nonfinite()


def nonfinite_weights(module: nn.Module) -> str:
    """Name the weights of `module` that are not finite; "" if all are.

    Of sharded weights, only this rank's parts are checked.
    """
    parts = ((name, _local(weight)) for name, weight in module.named_parameters())
    return _listed([name for name, weight in parts if not is_finite(weight)])


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
