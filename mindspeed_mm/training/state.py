"""Everything that moves while training, saved and loaded together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron.mm.schedules import ParamScheduler
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import parse_json

PACKED_BYTES = 1 << 20  # most bytes of a packed value


@dataclass
class Skips:
    """Iterations whose loss or gradient was not finite."""

    in_a_row: int = 0  # up to now
    total: int = 0  # of the whole run, over all its starts


@dataclass(kw_only=True)
class TrainState:
    """One checkpoint.

    The order of samples is a function of (seed, epoch): its state is `consumed_samples`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: ParamScheduler
    iteration: int = 0
    consumed_samples: int = 0
    skips: Skips = field(default_factory=Skips)
    loss_means: dict[int, tuple[int, float]] = field(
        default_factory=dict
    )  # this rank's, by band of timesteps
    hooks: dict[str, Any] = field(default_factory=dict)  # this rank's states of hooks, as of the last save


def pack(values: object) -> Tensor:
    """Plain numbers and strings → a uint8 tensor, so that a checkpoint holds tensors only."""
    return torch.tensor(list(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8)


def unpack(tensor: Tensor, where: str) -> Any:
    """Undo `pack`; `where` starts the message of the WeightsError that it raises for anything else."""
    try:
        text = bytes(tensor.tolist()).decode()
    except UnicodeDecodeError:
        raise WeightsError(
            "got bytes that are not UTF-8", where=where, expected="JSON", fix="load another iteration"
        ) from None
    return parse_json(text, where, WeightsError)


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Any, str]
) -> dict[str, dict[str, Tensor]]:
    """Parameter name → its moments and counters. Counters that are plain numbers become tensors."""
    return {
        names[parameter]: {
            key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in values.items()
        }
        for parameter, values in optimizer.state.items()
    }


def group_steps(optimizer: torch.optim.Optimizer) -> list[int | None]:
    """The counter that some fused optimizers keep in each group instead of in each parameter's state."""
    return [int(group["step"]) if "step" in group else None for group in optimizer.param_groups]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Mapping[str, Tensor]],
    steps: Iterable[int | None],
    names: Mapping[Any, str],
) -> None:
    """Undo `optimizer_state` and `group_steps`; learning rates stay the schedule's. Raises WeightsError."""
    packed = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [names[parameter] for parameter in ordered if names[parameter] not in state]
    if state and missing:
        raise WeightsError(
            f"the checkpoint has no optimizer state for {len(missing)} trainable weights "
            f"({', '.join(missing[:4])})",
            fix="train the same part as before, or add --no-load-optim",
        )
    for group in packed["param_groups"]:
        is_muons = "momentum" in group  # such a group has no second moment
        for name in (names[ordered[place]] for place in group["params"]):
            if name in state and ("exp_avg_sq" in state[name]) == is_muons:
                raise WeightsError(
                    f"the checkpoint's moments of {name} belong to another optimizer "
                    f"({', '.join(state[name])})",
                    fix="give --optimizer as before, or add --no-load-optim",
                )
    packed["state"] = {
        place: dict(state[names[parameter]])
        for place, parameter in enumerate(ordered)
        if names[parameter] in state
    }
    for group, step in zip(packed["param_groups"], steps, strict=False):
        if step is not None:
            group["step"] = step
    optimizer.load_state_dict(packed)
