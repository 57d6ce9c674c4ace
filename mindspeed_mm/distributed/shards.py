"""This rank's part of a sharded tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or an unsharded tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_local(parameter: Tensor, whole: Tensor) -> Tensor:
    """Copy this rank's part of `whole` into `parameter` and return it. Reads no other part."""
    if not isinstance(parameter, DTensor):
        return parameter.copy_(whole)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    region = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return local(parameter).copy_(whole[region])
