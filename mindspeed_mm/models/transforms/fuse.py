"""Fuse a LoRA into the base before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mindspeed_mm.config.schema import Config
from mindspeed_mm.log import get_logger, once
from mindspeed_mm.models.lora.adapter import merged
from mindspeed_mm.models.lora.fused import FusedLora
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.transforms.base import ModuleTransform
from mindspeed_mm.models.transforms.config import FuseLoraConfig
from mindspeed_mm.models.weights import open_adapter

if TYPE_CHECKING:
    from mindspeed_mm.models.spec import ModelSpec

logger = get_logger(__name__)


def build_fuse(config: FuseLoraConfig, spec: ModelSpec, trainable: str) -> FuseLora:
    """Build the transform of a `fuse_lora` entry."""
    return FuseLora(config)


@dataclass(frozen=True)
class FuseLora(ModuleTransform):
    """Adds a LoRA to the weights as they are read. Sums in fp32 and rounds once to the weights' dtype."""

    config: FuseLoraConfig

    def apply(self, model: nn.Module) -> None:
        """Do nothing, as only the weights change."""

    def change_source(self, source: WeightsSource) -> WeightsSource:
        """Add the LoRA to `source`. Raises WeightsError if it does not fit."""
        (lora,) = open_fused([self.config], source.shapes)
        logger.info(f"fuses {lora.adapter.description}, strength {lora.strength:g}", extra=once())
        return merged(source, [(lora.adapter, lora.strength)])


def open_fused(configs: Sequence[Config], shapes: Mapping[str, Sequence[int]]) -> list[FusedLora]:
    """Open the LoRAs of all `fuse_lora` entries in `configs`. Raises WeightsError."""
    return [
        FusedLora(open_adapter(config.path, shapes, expert=config.expert), config.strength, config.expert)
        for config in configs
        if isinstance(config, FuseLoraConfig)
    ]
