"""Applies fsdp2_config.yaml with torch's fully_shard.

Modules that a rank holds whole, in their compute dtype, are not wrapped: gathering would only copy them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from mindspeed_mm.accelerator import DTYPES
from mindspeed_mm.distributed.config import Fsdp2Config, check_reshard
from mindspeed_mm.distributed.mesh import Mesh
from mindspeed_mm.distributed.patterns import absent_units, match
from mindspeed_mm.errors import ConfigError


def shard_model(
    model: nn.Module,
    units: Sequence[str],
    config: Fsdp2Config,
    mesh: Mesh,
    *,
    fp32_modules: Iterable[str] = (),
    every: Sequence[str] | None = None,
) -> nn.Module:
    """Shard `model`, which may be on the meta device, in place.

    `units` are the patterns to use if the YAML has none. If `model` is only part of a model, `every` holds
    the module names of the whole model, because a pattern may match only in another part.

    Modules in `fp32_modules` compute in fp32. Each child of the root that no pattern covers is its own unit,
    so that no unit mixes fp32 with bf16 products, or trained weights with frozen weights of another dtype.
    Inputs are never cast, because a cast at the root would round timesteps to bf16. Units that need neither a
    gather nor a cast are not wrapped, so a model on one rank in fp32 is not wrapped at all. Raises
    ConfigError for a pattern that matches nothing, or a reshard_after_forward that does not fit the mesh.
    """
    check_reshard(config, mesh.shards.size(mesh.shards.ndim - 1))
    names = [name for name, _ in model.named_modules() if name]
    known: Sequence[str] = names if every is None else every
    here = set(names)
    where = "fsdp2_config.yaml"
    absent = absent_units(units, known)
    ignored = _ignored_parameters(model, known, config, where, absent)
    wrapped = [
        name
        for pattern in (config.sub_modules_to_wrap or units)
        for name in match(pattern, known, f"{where}:sub_modules_to_wrap", absent=absent)
        if name in here
    ]
    rest = [
        name
        for name, child in model.named_children()
        if _has_parameters(child) and not _covers(name, wrapped)
    ]
    exact = tuple(fp32_modules)
    dtypes = {
        name: torch.float32 if name.split(".")[0] in exact else DTYPES[config.param_dtype]
        for name in {*wrapped, *rest}
        if _has_parameters(model.get_submodule(name))
    }
    whole = _whole_units(model, dtypes, config, mesh)
    ignored |= {parameter for name in whole for parameter in model.get_submodule(name).parameters()}
    if not dtypes.keys() - whole:
        return model
    shard = _sharder(config, mesh, ignored)
    # Innermost first, because an inner unit must be wrapped before the outer one.
    for name in sorted(dtypes.keys() - whole, key=lambda name: (-name.count("."), names.index(name))):
        shard(model.get_submodule(name), dtypes[name])
    shard(model, DTYPES[config.param_dtype])
    # A matrix product over [B, S, D] returns a view. Our models never change a unit's output in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    _prefetch(model, config)
    return model


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Reduce gradients over ranks only for the last micro-batch. Call before each backward."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def fsdp_units(model: nn.Module) -> dict[str, FSDPModule]:
    """Map names to sharded units. The name of the root is ''."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def _sharder(
    config: Fsdp2Config, mesh: Mesh, ignored: set[nn.Parameter]
) -> Callable[[nn.Module, torch.dtype], None]:
    offload = CPUOffloadPolicy(pin_memory=config.pin_memory) if config.offload_to_cpu else OffloadPolicy()

    def shard(module: nn.Module, dtype: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=DTYPES[config.reduce_dtype], cast_forward_inputs=False
        )
        fully_shard(
            module,
            mesh=mesh.shards,
            reshard_after_forward=config.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=ignored or None,
        )

    return shard


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _whole_units(
    model: nn.Module, dtypes: Mapping[str, torch.dtype], config: Fsdp2Config, mesh: Mesh
) -> set[str]:
    """Return the units that a rank holds whole, in their compute dtype. They need no wrapping.

    These are frozen units and, on a single rank, trained ones. Either all trained units are included or none,
    because the optimizer's fused kernels do not accept a mix of sharded and plain tensors.
    """
    if config.offload_to_cpu or mesh.shards.size(mesh.shards.ndim - 1) > 1:
        return set()
    units = {name: list(model.get_submodule(name).parameters()) for name in dtypes}
    ready = {  # 8-bit weights are never cast
        name
        for name, parameters in units.items()
        if all(p.dtype == dtypes[name] or not p.is_floating_point() for p in parameters)
    }
    trained = {name for name, parameters in units.items() if any(p.requires_grad for p in parameters)}
    alone = mesh.dp_size * mesh.cp_size == 1 and trained <= ready
    return ready if alone else ready - trained


def _covers(child: str, wrapped: Sequence[str]) -> bool:
    """Return whether a child of the root is a unit, or a list whose items are units."""
    return any(name == child or name.startswith(child + ".") for name in wrapped)


def _ignored_parameters(
    model: nn.Module, names: Sequence[str], config: Fsdp2Config, where: str, absent: Sequence[str]
) -> set[nn.Parameter]:
    ignored: set[nn.Parameter] = set()
    here = dict(model.named_modules())
    for pattern in config.ignored_modules:
        for name in match(pattern, names, f"{where}:ignored_modules", absent=absent):
            found = set(here[name].parameters()) if name in here else set()
            if any(parameter.requires_grad for parameter in found):
                raise ConfigError(
                    f"{name} is trainable, and its gradients would not be reduced",
                    where=f"{where}:ignored_modules",
                    fix="ignore frozen modules only",
                )
            ignored |= found
    return ignored


def _prefetch(model: nn.Module, config: Fsdp2Config) -> None:
    """Record the order of the units in the first forward, then gather units ahead in that order.

    It differs from the order of the names, because branch blocks run between trunk blocks.
    """
    ahead, behind = config.num_to_forward_prefetch, config.num_to_backward_prefetch
    if not ahead and not behind:
        return
    order: list[FSDPModule] = []
    handles: list[Any] = []

    def seen(module: nn.Module, _: Any) -> None:
        if isinstance(module, FSDPModule) and module not in order:
            order.append(module)

    def done(module: nn.Module, _: Any, __: Any) -> None:
        for handle in handles:
            handle.remove()
        for index, unit in enumerate(order):
            unit.set_modules_to_forward_prefetch(order[index + 1 : index + 1 + ahead])
            if behind:
                unit.set_modules_to_backward_prefetch(order[max(index - behind, 0) : index][::-1])

    for name, unit in fsdp_units(model).items():
        if name and isinstance(unit, nn.Module):
            handles.append(unit.register_forward_pre_hook(seen))
    handles.append(model.register_forward_hook(done))
