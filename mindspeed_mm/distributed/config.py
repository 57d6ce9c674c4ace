"""How a run is spread over ranks: Megatron's parallel flags, the recompute flags and fsdp2_config.yaml.

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.errors import ConfigError

_ONE_STAGE = "use --use-torch-fsdp2 for memory, --context-parallel-size for long clips"


class ParallelConfig(Config):
    """Megatron's parallel flags. Data parallel is what is left: world size / context_parallel_size."""

    tensor_model_parallel_size: int = Field(default=1, ge=1, description="only 1: FSDP2 shards instead")
    pipeline_model_parallel_size: int = Field(default=1, ge=1, description="only 1: FSDP2 shards instead")
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None, ge=1, description="only 1: no pipeline"
    )
    context_parallel_size: int = Field(
        default=1, ge=1, le=65536, description="ranks that share the tokens of one sample"
    )
    context_parallel_algo: Literal["ulysses_cp_algo"] = Field(
        default="ulysses_cp_algo",
        description="how the tokens are shared: attention over all tokens, heads divided",
    )
    use_torch_fsdp2: bool = Field(
        default=False, description="shard with torch's fully_shard (always on here)"
    )
    fsdp2_config_path: str | None = Field(default=None, description="fsdp2_config.yaml")
    distributed_backend: Literal["nccl", "hccl", "gloo"] | None = Field(
        default=None,
        description="gloo anywhere; nccl and hccl both mean the device's own (default: the device's own)",
    )
    distributed_timeout_minutes: int = Field(
        default=10, gt=0, le=1000000, description="longest wait for another rank"
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None, description="forget a block's activations (selective: keep attention outputs)"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None,
        description="uniform: every block; block: the first --recompute-num-layers of trunk and of branch",
    )
    recompute_num_layers: int | None = Field(
        default=None, gt=0, le=1000, description="blocks recomputed by method block"
    )
    use_mindspeed: bool = Field(default=False, description="import MindSpeed's adaptor before megatron.core")

    @model_validator(mode="after")
    def _only_what_works(self) -> ParallelConfig:
        sizes = {
            "--tensor-model-parallel-size": self.tensor_model_parallel_size,
            "--pipeline-model-parallel-size": self.pipeline_model_parallel_size,
            "--virtual-pipeline-model-parallel-size": self.virtual_pipeline_model_parallel_size or 1,
        }
        for flag, size in sizes.items():
            if size != 1:
                raise ValueError(f"{flag} {size} is not supported; set it to 1 and {_ONE_STAGE}")
        if self.recompute_method == "block" and self.recompute_num_layers is None:
            raise ValueError("--recompute-method block needs --recompute-num-layers")
        if self.recompute_method is not None and self.recompute_granularity is None:
            raise ValueError("--recompute-method needs --recompute-granularity full or selective")
        return self


Recompute = Literal["full", "selective", "none"]


class Fsdp2Config(Config):
    """fsdp2_config.yaml. Module patterns: `blocks.{*}`, `vace_blocks.{0-3,7}`, `head`."""

    sharding_size: Literal["auto"] | int | None = Field(
        default=None, description="ranks that share one copy of the weights; auto or null: all of them"
    )
    sub_modules_to_wrap: tuple[str, ...] | None = Field(
        default=None, description="patterns of the modules that are gathered as one; null: every block"
    )
    reshard_after_forward: bool | int = Field(
        default=True, description="free gathered weights after forward (more memory left, one more gather)"
    )
    param_dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="dtype of matrix products")
    reduce_dtype: Literal["bf16", "fp32"] = Field(
        default="fp32", description="dtype of the gradient sum over ranks"
    )
    offload_to_cpu: bool = Field(
        default=False, description="keep shards, gradients and optimizer in host memory"
    )
    pin_memory: bool = Field(default=True, description="page-locked host memory for what is offloaded")
    recompute_modules: tuple[str, ...] | dict[str, Recompute] | None = Field(
        default=None, description="patterns to recompute in backward, or a map pattern: full|selective|none"
    )
    offload_block_inputs: bool = Field(
        default=False, description="keep the inputs of recomputed blocks in host memory until backward"
    )
    num_to_forward_prefetch: int = Field(
        default=0, ge=0, le=1000, description="units gathered ahead in forward"
    )
    num_to_backward_prefetch: int = Field(
        default=0, ge=0, le=1000, description="units gathered ahead in backward"
    )
    ignored_modules: tuple[str, ...] = Field(
        default=(), description="patterns of frozen modules that stay whole on each rank"
    )
    compile: bool = Field(default=False, description="compile each block with torch.compile")
    UNUSED: ClassVar[Mapping[str, str]] = {
        "cast_forward_inputs": (
            "inputs are cast where a product needs it; casting them all would round timesteps to bf16"
        ),
        "output_dtype": "blocks answer in the residual's dtype",
    }

    @model_validator(mode="before")
    @classmethod
    def _null_lists(cls, values: object) -> object:
        """`ignored_modules:` with nothing behind it is an empty list; null switches keep their defaults."""
        if not isinstance(values, Mapping):
            return values
        optional = ("sharding_size", "sub_modules_to_wrap", "recompute_modules")
        return {key: value for key, value in values.items() if value is not None or key in optional}

    @field_validator("sharding_size", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        """YAML reads `yes` as true, and true counts as 1.

        That would silently mean a copy of the weights on every rank.
        """
        if isinstance(value, bool):
            raise ValueError("is a switch, not a size; write auto, null or a number of ranks")
        return value

    @model_validator(mode="after")
    def _positive(self) -> Fsdp2Config:
        if isinstance(self.sharding_size, int) and self.sharding_size < 1:
            raise ValueError(f"sharding_size {self.sharding_size} must be auto, null or a number of ranks")
        if self.reshard_after_forward < 1 and self.reshard_after_forward is not False:
            raise ValueError(
                f"reshard_after_forward {self.reshard_after_forward} must be true, false or a number of ranks"
            )
        return self

    @classmethod
    def read(cls, path: str | Path | None, notes: list[str] | None = None) -> Fsdp2Config:
        """The YAML file, or the defaults without one. Raises ConfigError with file and key."""
        return cls() if path is None else parse(cls, read_yaml(path) or {}, Path(path).name, notes)


def check_context_parallel(num_heads: int, size: int) -> None:
    """Ulysses divides heads over ranks. Raises ConfigError naming the sizes that fit."""
    if num_heads % size:
        allowed = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ConfigError(
            f"{size} does not divide the model's {num_heads} attention heads",
            where="--context-parallel-size",
            fix=f"use one of {', '.join(map(str, allowed))}",
        )


def check_reshard(config: Fsdp2Config, ranks: int) -> None:
    """`ranks` share one copy of the weights; a number in reshard_after_forward cuts them.

    Raises ConfigError.
    """
    size = config.reshard_after_forward
    if not isinstance(size, bool) and ranks % size:
        allowed = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise ConfigError(
            f"{size} does not divide the {ranks} rank(s) that share the weights",
            where="fsdp2_config.yaml:reshard_after_forward",
            fix=f"use true, false or one of {', '.join(map(str, allowed))}",
        )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """World size / context_parallel_size. Raises ConfigError when that leaves a remainder."""
    size = parallel.context_parallel_size
    if world_size % size:
        raise ConfigError(
            f"{world_size} rank(s) cannot be split into groups of {size}",
            where="--context-parallel-size",
            fix=f"start a multiple of {size} ranks, or lower it",
        )
    return world_size // size
