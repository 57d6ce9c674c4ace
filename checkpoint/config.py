"""What a conversion is told: `--cfg.…` flags are these fields. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mindspeed_mm.config.schema import Config


class TargetParallelConfig(Config):
    """How the converted weights are split."""

    pp_layers: list[int] | list[list[int]] = Field(
        default=[],
        description="layers of each pipeline stage, e.g. '[7,8,8,7]'; a list of lists has one list for each virtual chunk; "
        "[] = one file",
    )


class ConvertConfig(Config):
    """What every conversion needs."""

    source_path: str = Field(description="folder or file with the weights; what is in it decides how it is read")
    target_path: str = Field(description="folder or file to write; parents are made")
    dtype: Literal["source", "bf16", "fp32"] = Field(default="source", description="dtype of the written weights")
    verify: Literal["heads", "bits"] = Field(
        default="heads",
        description="what is read back: names, shapes and 64 KiB of each weight, or every bit",
    )


class ToMmConfig(ConvertConfig):
    """Original or diffusers weights → MM folder."""

    target_parallel_config: TargetParallelConfig = Field(default=TargetParallelConfig(), description="pipeline stages")


class FromMmConfig(ConvertConfig):
    """MM or DCP folder → original or diffusers weights."""

    base_path: str | None = Field(
        default=None, description="weights that a checkpoint of the trained part is completed from, if they moved"
    )
    max_shard_gb: float = Field(default=10.0, gt=0, description="most GB (10^9 bytes) of one file of a folder")


class ResplitConfig(ToMmConfig):
    """MM folder → MM folder with other stages."""

    base_path: str | None = Field(
        default=None, description="weights that a checkpoint of the trained part is completed from, if they moved"
    )
