"""Training state that is saved and loaded together."""

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

PACKED_BYTES = 1 << 20  # maximum size of a packed value in bytes


@dataclass
class Skips:
    """Number of iterations whose loss or gradient was not finite."""

    in_a_row: int = 0  # consecutive, up to the current iteration
    total: int = 0  # in the whole run, including before it was resumed


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes during training and that a checkpoint contains.

    The order of samples is a function of (seed, epoch), so `consumed_samples` is its entire state.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: ParamScheduler
    iteration: int = 0
    consumed_samples: int = 0
    skips: Skips = field(default_factory=Skips)
    # This rank's running means: timestep band → (samples seen, mean loss).
    loss_means: dict[int, tuple[int, float]] = field(default_factory=dict)
    hooks: dict[str, Any] = field(default_factory=dict)  # this rank's hook states, as of the last save


def pack(values: object) -> Tensor:
    """Encode plain numbers and strings in a uint8 tensor, so that a checkpoint contains only tensors."""
    return torch.tensor(list(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8)


def unpack(tensor: Tensor, where: str) -> Any:
    """Decode a tensor made by `pack`.

    Raises WeightsError for any other tensor; `where` is the location that its message names.
    """
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
    """Map each parameter name to its moments and counters. Plain numbers become tensors."""
    return {
        names[parameter]: {
            key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in values.items()
        }
        for parameter, values in optimizer.state.items()
    }


def group_steps(optimizer: torch.optim.Optimizer) -> list[int | None]:
    """Return the step counter of each parameter group, or None for groups without one.

    Some fused optimizers keep one counter per group instead of one per parameter.
    """
    return [int(group["step"]) if "step" in group else None for group in optimizer.param_groups]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Mapping[str, Tensor]],
    steps: Iterable[int | None],
    names: Mapping[Any, str],
) -> None:
    """Load the results of `optimizer_state` and `group_steps` into `optimizer`.

    Learning rates are not loaded; the schedule sets them. Raises WeightsError if moments are missing or
    belong to another optimizer.
    """
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
        is_muons = "momentum" in group  # Muon groups have no second moment
        for name in (names[ordered[index]] for index in group["params"]):
            if name in state and ("exp_avg_sq" in state[name]) == is_muons:
                raise WeightsError(
                    f"the checkpoint's moments of {name} belong to another optimizer "
                    f"({', '.join(state[name])})",
                    fix="use the same --optimizer as before, or add --no-load-optim",
                )
    packed["state"] = {
        index: dict(state[names[parameter]])
        for index, parameter in enumerate(ordered)
        if names[parameter] in state
    }
    for group, step in zip(packed["param_groups"], steps, strict=False):
        if step is not None:
            group["step"] = step
    optimizer.load_state_dict(packed)
