"""Creates and destroys the process groups of megatron.core.parallel_state."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from megatron.mm.core import core
from mindspeed_mm.errors import LaunchError


@dataclass(frozen=True)
class Groups:
    """This rank's process groups."""

    data: Any  # ranks with different samples and the same token positions
    context: Any  # ranks that share the tokens of one sample
    data_context: Any  # both: the ranks over which gradients are averaged
    shard: Any  # ranks of data_context that share one copy of the weights
    replica: Any | None  # ranks with the same shard of the other copies; None with one copy
    ulysses: Any  # ranks of context that exchange heads for tokens
    ring: Any | None  # ranks of context that pass keys and values around a ring; None with Ulysses alone
    pipeline: Any  # ranks with the stages of the model, in order


def import_mindspeed() -> None:
    """Apply MindSpeed's patches, which must happen before megatron.core is imported.

    Raises LaunchError if MindSpeed is not installed or megatron.core is already imported.
    """
    if "megatron.core" in sys.modules and "mindspeed.megatron_adaptor" not in sys.modules:
        raise LaunchError(
            "megatron.core was imported before MindSpeed's adaptor",
            where="--use-mindspeed",
            fix="import the adaptor first",
        )
    try:
        import_module("mindspeed.megatron_adaptor")
    except ImportError as error:
        raise LaunchError(
            f"{error}", where="--use-mindspeed", fix="install MindSpeed, or remove the flag"
        ) from None


def initialize(
    context_parallel_size: int,
    copies: int,
    timeout_minutes: int,
    *,
    pipeline_size: int = 1,
    virtual_size: int = 1,
    ulysses_size: int | None = None,
) -> Groups:
    """Create all groups.

    `copies` is the number of copies of a stage's weights. `ulysses_size` neighbors in a context group
    exchange heads, and rings connect them (None = the whole group exchanges heads).

    Raises LaunchError if the sizes do not divide the number of ranks.
    """
    state = core("parallel_state")
    has_rings = ulysses_size not in (None, context_parallel_size)
    if not state.model_parallel_is_initialized():
        try:
            state.initialize_model_parallel(
                pipeline_model_parallel_size=pipeline_size,
                virtual_pipeline_model_parallel_size=virtual_size if virtual_size > 1 else None,
                context_parallel_size=context_parallel_size,
                hierarchical_context_parallel_sizes=[
                    ulysses_size,
                    context_parallel_size // (ulysses_size or 1),
                ]
                if has_rings
                else None,
                num_distributed_optimizer_instances=copies,
                distributed_timeout_minutes=timeout_minutes,
                create_gloo_process_groups=False,
            )
        except (RuntimeError, AssertionError) as error:
            raise LaunchError(
                f"megatron.core cannot build the process groups: {error}",
                where=f"--context-parallel-size {context_parallel_size}, {copies} copies",
            ) from None
    whole = state.get_data_parallel_group(with_context_parallel=True)
    context = state.get_context_parallel_group()
    inner, ring = state.get_hierarchical_context_parallel_groups() if has_rings else (context, None)
    return Groups(
        data=state.get_data_parallel_group(),
        context=context,
        data_context=whole,
        shard=state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
        if copies > 1
        else whole,
        replica=_replica_group(state) if copies > 1 else None,
        ulysses=inner,
        ring=ring,
        pipeline=state.get_pipeline_model_parallel_group(),
    )


def destroy() -> None:
    """Destroy all groups; does nothing if there are none."""
    state = sys.modules.get("megatron.core.parallel_state")  # avoid the import if there is nothing to destroy
    if state is not None and state.model_parallel_is_initialized():
        state.destroy_model_parallel()


def _replica_group(state: ModuleType) -> Any:
    # Renamed in core 0.13; 0.12.1 has the older name.
    for name in ("get_inter_distributed_optimizer_instance_group", "get_inter_partial_data_parallel_group"):
        getter = getattr(state, name, None)
        if getter is not None:
            return getter()
    raise LaunchError(
        "this megatron.core has no group of weight copies",
        fix="install megatron-core 0.12.1 or newer, or set sharding_size: auto in fsdp2_config.yaml",
    )
