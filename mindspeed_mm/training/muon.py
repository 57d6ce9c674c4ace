"""Muon optimizer: matrices are updated with their orthogonalized momentum, all other parameters with AdamW.

The algorithm is that of Jordan et al. 2024, with the step size of Liu et al. 2025. The root mean square of an
update equals that of an AdamW update, so the learning rate and weight decay of an AdamW recipe apply. Muon
keeps one moment per parameter; AdamW keeps two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from mindspeed_mm.distributed.shards import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values reach 0.7 … 1.2 in five steps
STEPS = 5
UPDATE_RMS = 0.2  # root mean square of an AdamW update, as measured by Liu et al.
ELEMENTS_AT_ONCE = 2**26  # elements that one rank orthogonalizes at once: 128 MB in bf16


class Muon(torch.optim.AdamW):
    """Applies Muon to parameter groups with `momentum`, and AdamW to the other groups.

    With sharded parameters (DTensors), no rank gathers the whole model. The ranks exchange slices of many
    matrices, so that each rank gets a few whole matrices.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is supported
        """Update every parameter that has a gradient. Clears the gradients of the Muon groups."""
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for matrices in _portions(parameters):
                updates = orthogonalized([self._direction(matrix, group["momentum"]) for matrix in matrices])
                size = UPDATE_RMS * math.sqrt(max(matrices[0].shape))
                for matrix, update in zip(matrices, updates, strict=True):
                    part = local(matrix)
                    part.mul_(1 - group["lr"] * group["weight_decay"])
                    # `to` also moves the update to the device of `part`, which may be offloaded.
                    part.sub_(update.to(part), alpha=group["lr"] * size)
                    matrix.grad = None  # AdamW skips parameters without a gradient
        super().step()

    def _direction(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Return the Nesterov direction: the gradient, interpolated toward its running mean.

        The state uses AdamW's names, so that checkpoints store it in the same way.
        """
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(matrix)
        state["step"] += 1
        state["exp_avg"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(state["exp_avg"], momentum)


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize each of `matrices` as a whole, and return this rank's slices.

    All matrices have the same shape. Either all are plain tensors, or all are DTensors on the same mesh.

    Communication and computation use bf16, as published, or fp32 on a CPU. Offloaded slices are moved to the
    mesh's device, and the results stay there.
    """
    first = matrices[0]
    device = first.device_mesh.device_type if isinstance(first, DTensor) else first.device.type
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    slices = torch.stack([local(matrix).to(dtype) for matrix in matrices])
    if not isinstance(first, DTensor):
        return list(newton_schulz(slices).unbind())
    sliced = [Shard(place.dim + 1) if isinstance(place, Shard) else Replicate() for place in first.placements]
    # Replicas first divide the matrices among themselves. Otherwise, each would gather all slices.
    fewer = [place if isinstance(place, Shard) else Shard(0) for place in sliced]
    whole: list[Placement] = [Shard(0)] * first.device_mesh.ndim
    stack = _distributed(slices, len(matrices), first, sliced).redistribute(placements=fewer)
    mine = newton_schulz(stack.redistribute(placements=whole).to_local())
    return list(
        _distributed(mine, len(matrices), first, whole).redistribute(placements=sliced).to_local().unbind()
    )


def newton_schulz(matrices: Tensor) -> Tensor:
    """Bring the singular values of `matrices` [n, rows, columns] to about 1.

    Shape, dtype and singular vectors stay the same.
    """
    if not matrices.numel():  # a rank without a matrix
        return matrices
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _portions(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield groups of parameters that have the same shape and sharding.

    For each group, a rank gets at most ELEMENTS_AT_ONCE elements of whole matrices, and four times as many
    in slices.
    """
    alike: dict[tuple[object, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        where = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else ()
        alike.setdefault((parameter.shape, *where), []).append(parameter)
    for found in alike.values():
        shards, copies = _spread(found[0])
        portion = max(1, ELEMENTS_AT_ONCE // found[0].numel()) * shards * min(copies, 4)
        for start in range(0, len(found), portion):
            yield found[start : start + portion]


def _spread(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the number of ranks that `parameter` is sharded over, and the number of its replicas."""
    shards = copies = 1
    if isinstance(parameter, DTensor):
        for size, place in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            shards, copies = (shards * size, copies) if isinstance(place, Shard) else (shards, copies * size)
    return shards, copies


def _distributed(part: Tensor, count: int, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    """Wrap this rank's part of a stack [count, *like.shape] in a DTensor on the mesh of `like`."""
    rows, columns = like.shape
    return DTensor.from_local(
        part.contiguous(),
        like.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size((count, rows, columns)),
        stride=(rows * columns, columns, 1),
    )
