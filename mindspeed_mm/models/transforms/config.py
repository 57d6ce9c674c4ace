"""Schemas of the `transforms` in a model JSON: changes to a model before its weights load.

Does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mindspeed_mm.config.schema import Config
from mindspeed_mm.config.typed_list import parse_typed_list
from mindspeed_mm.registry import Registry

Part = Literal["branch", "trunk", "both"]
Expert = Literal["high", "low"]
QuantFormat = Literal["int8", "fp8"]
Pattern = Annotated[str, Field(min_length=1)]
_EXPERT = "which LoRA to use from a file for both experts of A14B; default: diffusion.expert"


class LoraConfig(Config):
    """A low-rank update of frozen linear layers: y = W x + scale · B A x."""

    type: Literal["lora"] = "lora"
    rank: int = Field(
        default=32, gt=0, le=4096, description="rank: the number of columns of B and of rows of A"
    )
    alpha: float | None = Field(
        default=None, gt=0, description="the scale is alpha / rank; default: the rank, which gives scale 1"
    )
    rslora: bool = Field(default=False, description="use the scale alpha / √rank")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of the inputs of A that are set to zero in training"
    )
    on: Part | None = Field(
        default=None,
        description=(
            "part of the model that gets the LoRA; default: the part that predictor.trainable names"
        ),
    )
    match: tuple[Pattern, ...] = Field(
        default=(),
        description=(
            "name suffixes of the linear layers that get the LoRA, where * matches any text; "
            "default: q, k, v, o, ffn.0, ffn.2"
        ),
    )
    init_from: Pattern | None = Field(
        default=None,
        description="LoRA to continue from: a file of any dialect or a LoRA checkpoint, with the same rank",
    )
    expert: Expert | None = Field(default=None, description=_EXPERT)
    modules_to_save: tuple[Pattern, ...] = Field(
        default=(), description="modules to train in full next to the LoRA, such as vace_patch_embedding"
    )

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class FuseLoraConfig(Config):
    """A LoRA, such as a few-step one, that is added to the weights before training and does not train."""

    type: Literal["fuse_lora"] = "fuse_lora"
    path: Pattern = Field(description="a LoRA file of any dialect, or a LoRA checkpoint")
    strength: float = Field(default=1.0, ge=-100, le=100, description="factor of the update")
    expert: Expert | None = Field(default=None, description=_EXPERT)


class QuantizeConfig(Config):
    """Frozen linear layers in 8 bits, which take half the memory of bf16.

    Weights are rounded as they are read. They are never saved.
    """

    type: Literal["quantize"] = "quantize"
    format: QuantFormat = Field(
        default="int8",
        description=(
            "int8 (works on every device), or fp8 (e4m3, with three times the rounding error of int8)"
        ),
    )
    match: tuple[Pattern, ...] = Field(
        default=(),
        description=(
            "name suffixes of the layers, such as blocks.*, where * matches any text; default: "
            "all frozen q, k, v, o, ffn.0 and ffn.2 of the blocks"
        ),
    )

    @field_validator("match", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class TransformSpec:
    """One kind of transform, selected by the `type` of an entry in `transforms`."""

    config: type[Config]  # schema of the entry
    build: str  # "module:callable", build(config, spec, trainable) → ModuleTransform


TRANSFORMS: Registry[TransformSpec] = Registry("transform", "mindspeed_mm.transforms")
TRANSFORMS.add(
    "lora", TransformSpec(config=LoraConfig, build="mindspeed_mm.models.transforms.lora:build_lora")
)
TRANSFORMS.add(
    "fuse_lora", TransformSpec(config=FuseLoraConfig, build="mindspeed_mm.models.transforms.fuse:build_fuse")
)
TRANSFORMS.add(
    "quantize",
    TransformSpec(config=QuantizeConfig, build="mindspeed_mm.models.transforms.quantize:build_quantize"),
)


def parse_transforms(values: Any, where: str, notes: list[str] | None = None) -> tuple[Config, ...]:
    """Parse `transforms` of a model JSON into one config for each. Raises ConfigError with the location."""
    return parse_typed_list(values, where, TRANSFORMS, '[{"type": "lora", "rank": 32}]', notes)
