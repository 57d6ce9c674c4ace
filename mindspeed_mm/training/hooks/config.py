"""Configuration of `hooks` in a model JSON: optional training behaviours. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from mindspeed_mm.config.schema import Config
from mindspeed_mm.config.typed_list import parse_typed_list
from mindspeed_mm.registry import Registry


class EarlyStopConfig(Config):
    """End the run when the held-out loss no longer decreases."""

    type: Literal["early_stop"] = "early_stop"
    patience: int = Field(
        default=5, gt=0, le=1000000, description="consecutive evaluations without a lower held-out loss"
    )
    min_delta: float = Field(
        default=0.0, ge=0, le=1000000, description="minimum decrease that counts as a lower loss"
    )


@dataclass(frozen=True)
class HookSpec:
    """One kind of training hook, selected by the `type` of an entry in `hooks`."""

    config: type[Config]  # schema of the entry; its field `type` is the registered name
    build: str  # "module:callable", called build(config) → a Hook


TRAINING_HOOKS: Registry[HookSpec] = Registry("training hook", "mindspeed_mm.training_hooks")
TRAINING_HOOKS.add(
    "early_stop", HookSpec(config=EarlyStopConfig, build="mindspeed_mm.training.hooks.early_stop:EarlyStop")
)


def parse_hooks(values: Any, where: str, notes: list[str] | None = None) -> tuple[Config, ...]:
    """Parse the list `hooks` of a model JSON into one config per entry.

    Raises ConfigError with the address of the invalid value.
    """
    return parse_typed_list(values, where, TRAINING_HOOKS, '[{"type": "early_stop", "patience": 5}]', notes)
