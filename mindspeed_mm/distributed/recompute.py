"""Activation recomputation: a block saves only its inputs, or also its costliest results.

Recomputation happens inside the FSDP unit, so the weights of a block are gathered once for its second forward
and its backward. Parameter names do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mindspeed_mm.distributed.config import Recompute


def apply_recompute(
    model: nn.Module, plan: Mapping[str, Recompute], *, inputs_to_host: bool, pin: bool
) -> None:
    """Wrap the forward of each module in `plan`. Its parameters, hooks and type do not change.

    `inputs_to_host` keeps each module's first input in host memory until backward, page-locked with `pin`.
    """
    for name, mode in plan.items():
        module = model.get_submodule(name)
        trained = any(parameter.requires_grad for parameter in module.parameters())
        drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
        how = _RecomputeSettings(mode, trained, drops, inputs_to_host, pin)
        module.forward = partial(_recomputed, module.forward, how)


def compile_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Compile each block's forward with its recomputation. Blocks of one type share a graph."""
    for name in names:
        module = model.get_submodule(name)
        module.forward = torch.compile(module.forward)


class _RecomputeSettings(NamedTuple):
    """Recompute settings of one module."""

    mode: Recompute
    trained: bool  # at least one of its weights has a gradient
    drops: bool  # has dropout, whose random numbers must repeat in the second forward
    to_host: bool
    pin: bool


def _recomputed(forward: Callable[..., Any], how: _RecomputeSettings, *args: Any) -> Any:
    if not torch.is_grad_enabled() or not (how.trained or any(_has_gradient(value) for value in args)):
        return forward(*args)  # no backward follows, so nothing is kept
    more: dict[str, Any] = (
        {"context_fn": partial(_selective_contexts, how.trained)} if how.mode == "selective" else {}
    )
    run = partial(checkpoint, forward, *args, use_reentrant=False, preserve_rng_state=how.drops, **more)
    if not how.to_host:
        return run()
    with _input_on_host(args[0], how.pin):
        return run()


def _has_gradient(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_has_gradient(item) for item in value)
    return isinstance(value, Tensor) and value.requires_grad


def _selective_contexts(trained: bool) -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, trained))  # type: ignore[no-untyped-call]


def _policy(trained: bool, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results that take the most compute time for their memory.

    These are the outputs of attention, and in a trained block also the output of the feed-forward, which the
    gradient of the gate after it reads. Attention kernels have many names (flash, efficient, cudnn, CPU,
    NPU), but all contain "attention".
    """
    kept = "attention" in str(operator) or (trained and operator in _PRODUCTS and _narrows(args[-1]))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _narrows(matrix: Tensor) -> bool:
    wide, narrow = matrix.shape
    return bool(narrow < wide)


def _input_on_host(x: Tensor, pin: bool) -> torch.autograd.graph.saved_tensors_hooks:
    """Keep `x`, a block's input, in host memory until backward. Tensors that all blocks share stay."""
    address, device = x.data_ptr(), x.device

    def pack(tensor: Tensor) -> tuple[bool, Tensor]:
        if tensor.data_ptr() != address:
            return False, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
        host.copy_(tensor, non_blocking=pin)
        return True, host

    def unpack(packed: tuple[bool, Tensor]) -> Tensor:
        moved, tensor = packed
        return tensor.to(device, non_blocking=True) if moved else tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
