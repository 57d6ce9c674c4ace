"""Rotary position embeddings over three axes, with real cos and sin tables.

Adjacent channels of a head form a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_mm.errors import DataError
from mindspeed_mm.ops import npu

MAX_POSITIONS = 1024  # positions per axis; the published tables end there
THETA = 10000.0


def rope_tables(
    grid: tuple[int, int, int], dims: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [S, K/2], for the tokens of a (time, height, width) grid in (f, h, w) order.

    `dims` is the number of channels of a head for each axis. The angle of pair j is
    position·10000^(-2j/dim), computed in fp64. Raises DataError if an axis has more than 1024 positions, the
    length of the published tables.
    """
    if max(grid) > MAX_POSITIONS:
        raise DataError(
            f"token grid {grid} is longer than {MAX_POSITIONS} on one axis",
            fix="use a shorter or smaller clip",
        )
    angles = [_axis_angles(length, dim) for length, dim in zip(grid, dims, strict=True)]
    return _spread(angles, grid, torch.cos, device), _spread(angles, grid, torch.sin, device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels of x [B, S, N, K] by its token's angle; cos and sin are [S, K/2].

    The result has the dtype of x.
    """
    if npu.is_on_npu(x) and npu.can_rotate(x):
        return npu.apply_rope(x, cos, sin)
    # the compiler can fuse real arithmetic, but not complex numbers
    if npu.is_on_npu(x) or torch.compiler.is_compiling():
        return apply_rope_reference(x, cos, sin)
    rotated: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Reference implementation of `apply_rope` in real fp32 arithmetic."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Rotation as a complex product.

    Backward rotates in the opposite direction. Only the tables, which all blocks share, are saved for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().contiguous().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None, :]).flatten(-2).to(x.dtype)


def _axis_angles(length: int, dim: int) -> Tensor:
    """Return angles [length, dim/2] in fp64, on the CPU because some accelerators lack fp64."""
    rates = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), rates)


def _spread(
    angles: list[Tensor],
    grid: tuple[int, int, int],
    function: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    tables = [function(axis).float().to(device) for axis in angles]
    frames, height, width = (
        table.view(*(-1 if i == axis else 1 for i in range(3)), table.shape[-1]).expand(*grid, -1)
        for axis, table in enumerate(tables)
    )
    return torch.cat((frames, height, width), dim=-1).flatten(0, 2)
