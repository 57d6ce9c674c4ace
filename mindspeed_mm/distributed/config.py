"""Settings of distributed training: Megatron's parallel and recompute flags, and fsdp2_config.yaml.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.config.yaml_file import read_yaml
from mindspeed_mm.errors import ConfigError

_NO_TP = "use --use-torch-fsdp2 or pipeline stages for memory, --context-parallel-size for long clips"


class ParallelConfig(Config):
    """Megatron's parallel flags. The data-parallel size is world size / (context · pipeline)."""

    tensor_model_parallel_size: int = Field(
        default=1, ge=1, description="must be 1; FSDP2 shards the weights instead"
    )
    pipeline_model_parallel_size: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="number of pipeline stages, each with its own layers and ranks",
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="number of interleaved parts of the layers on each pipeline rank",
    )
    pipeline_schedule: Literal["1f1b", "gpipe"] = Field(
        default="1f1b",
        description=(
            "1f1b keeps few micro-batches in memory and is interleaved if there are virtual "
            "stages; gpipe keeps all of them"
        ),
    )
    context_parallel_size: int = Field(
        default=1, ge=1, le=65536, description="number of ranks that share the tokens of one sample"
    )
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = Field(
        default="ulysses_cp_algo",
        description=(
            "how ranks share tokens: ulysses divides the heads, megatron passes keys and values "
            "around a ring, and hybrid uses Ulysses between neighbouring ranks and rings between "
            "these groups"
        ),
    )
    ulysses_degree_in_cp: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="with hybrid_cp_algo: number of ranks that divide the heads",
    )
    use_torch_fsdp2: bool = Field(default=False, description="shard with torch's fully_shard (always on)")
    fsdp2_config_path: str | None = Field(default=None, description="fsdp2_config.yaml")
    distributed_backend: Literal["nccl", "hccl", "gloo"] | None = Field(
        default=None,
        description=(
            "gloo works on every device; nccl and hccl both select the device's own backend "
            "(default: the device's own)"
        ),
    )
    distributed_timeout_minutes: int = Field(
        default=10, gt=0, le=1000000, description="maximum time to wait for another rank"
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None,
        description=(
            "recompute the activations of blocks in the backward pass; selective keeps attention outputs"
        ),
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None,
        description=(
            "uniform: recompute every block; block: recompute the first --recompute-num-layers "
            "blocks of the trunk and of the branch"
        ),
    )
    recompute_num_layers: int | None = Field(
        default=None, gt=0, le=1000, description="number of blocks that --recompute-method block recomputes"
    )
    use_mindspeed: bool = Field(default=False, description="import MindSpeed's adaptor before megatron.core")

    @model_validator(mode="after")
    def _only_what_works(self) -> ParallelConfig:
        if self.tensor_model_parallel_size != 1:
            size = self.tensor_model_parallel_size
            raise ValueError(
                f"--tensor-model-parallel-size {size} is not supported: for the tokens of a video, it sends "
                f"more than FSDP2; set it to 1 and {_NO_TP}"
            )
        if self.virtual_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--virtual-pipeline-model-parallel-size {self.virtual_size} needs "
                "--pipeline-model-parallel-size 2 or more; remove it, or set both"
            )
        if (self.context_parallel_algo == "hybrid_cp_algo") != (self.ulysses_degree_in_cp is not None):
            raise ValueError(
                "--context-parallel-algo hybrid_cp_algo and --ulysses-degree-in-cp must be used together"
            )
        if self.context_parallel_size % self.ulysses_size:
            raise ValueError(
                f"--ulysses-degree-in-cp {self.ulysses_size} does not divide --context-parallel-size "
                f"{self.context_parallel_size}"
            )
        if self.recompute_method == "block" and self.recompute_num_layers is None:
            raise ValueError("--recompute-method block needs --recompute-num-layers")
        if self.recompute_method is not None and self.recompute_granularity is None:
            raise ValueError("--recompute-method needs --recompute-granularity full or selective")
        return self

    @property
    def ulysses_size(self) -> int:
        """Number of ranks that exchange heads; rings connect such groups within a context-parallel group."""
        if self.context_parallel_algo == "megatron_cp_algo":
            return 1
        return self.ulysses_degree_in_cp or self.context_parallel_size

    @property
    def virtual_size(self) -> int:
        """Number of stages on each rank."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def num_stages(self) -> int:
        """Number of stages of the model."""
        return self.pipeline_model_parallel_size * self.virtual_size


Recompute = Literal["full", "selective", "none"]


class Fsdp2Config(Config):
    """fsdp2_config.yaml. Module patterns: `blocks.{*}`, `vace_blocks.{0-3,7}`, `head`."""

    sharding_size: Literal["auto"] | int | None = Field(
        default=None,
        description="number of ranks that share one copy of the weights; auto or null = all ranks",
    )
    sub_modules_to_wrap: tuple[str, ...] | None = Field(
        default=None,
        description="patterns of the modules that are gathered as one unit; null = every block",
    )
    reshard_after_forward: bool | int = Field(
        default=True,
        description=(
            "free the gathered weights after the forward pass: needs less memory, but one more gather"
        ),
    )
    param_dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="dtype of matrix products")
    reduce_dtype: Literal["bf16", "fp32"] = Field(
        default="fp32", description="dtype in which gradients are reduced over ranks"
    )
    offload_to_cpu: bool = Field(
        default=False, description="keep shards, gradients and optimizer state in host memory"
    )
    pin_memory: bool = Field(default=True, description="offload to page-locked host memory")
    recompute_modules: tuple[str, ...] | dict[str, Recompute] | None = Field(
        default=None,
        description=(
            "patterns of the modules to recompute in the backward pass, or a map from patterns to "
            "full, selective or none"
        ),
    )
    offload_block_inputs: bool = Field(
        default=False,
        description="keep the inputs of recomputed blocks in host memory until the backward pass",
    )
    num_to_forward_prefetch: int = Field(
        default=0, ge=0, le=1000, description="number of units that are gathered ahead in the forward pass"
    )
    num_to_backward_prefetch: int = Field(
        default=0, ge=0, le=1000, description="number of units that are gathered ahead in the backward pass"
    )
    ignored_modules: tuple[str, ...] = Field(
        default=(), description="patterns of frozen modules that are not sharded"
    )
    compile: bool = Field(default=False, description="compile each block with torch.compile")
    UNUSED: ClassVar[Mapping[str, str]] = {
        "cast_forward_inputs": (
            "each layer casts its own inputs; casting all inputs would round timesteps to bf16"
        ),
        "output_dtype": "blocks return the dtype of the residual stream",
    }

    @model_validator(mode="before")
    @classmethod
    def _null_lists(cls, values: object) -> object:
        """Drop nulls of keys that do not accept null: an empty `ignored_modules:` gets its default."""
        if not isinstance(values, Mapping):
            return values
        optional = ("sharding_size", "sub_modules_to_wrap", "recompute_modules")
        return {key: value for key, value in values.items() if value is not None or key in optional}

    @field_validator("sharding_size", mode="before")
    @classmethod
    def _no_switch(cls, value: object) -> object:
        """Reject booleans: `true` equals 1, which would silently copy the weights to every rank."""
        if isinstance(value, bool):
            raise ValueError("is a boolean, not a size; use auto, null or a number of ranks")
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
        """Read the YAML file, or return the defaults without one. Raises ConfigError with file and key."""
        return cls() if path is None else parse(cls, read_yaml(path) or {}, Path(path).name, notes)


def check_context_parallel(num_heads: int, ulysses: int, flag: str = "--context-parallel-size") -> None:
    """Check that Ulysses can divide the heads over `ulysses` ranks. Raises ConfigError."""
    if num_heads % ulysses:
        allowed = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        fix = f"use one of {', '.join(map(str, allowed))}"
        if flag == "--context-parallel-size":
            fix += ", or --context-parallel-algo hybrid_cp_algo with --ulysses-degree-in-cp"
        raise ConfigError(
            f"{ulysses} does not divide the model's {num_heads} attention heads", where=flag, fix=fix
        )


def check_reshard(config: Fsdp2Config, ranks: int) -> None:
    """Check that a number in reshard_after_forward divides the `ranks` that share one copy of the weights.

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


def bubble(stages: int, virtual: int, micro_batches: int) -> float:
    """Return the pipeline bubble, the share of a step that a rank waits: (p - 1) / (v m + p - 1)."""
    return (stages - 1) / (virtual * micro_batches + stages - 1)


def check_micro_batches(parallel: ParallelConfig, micro_batches: int, unit: int) -> None:
    """Raise ConfigError for fewer micro-batches than stages. `unit` is their size over all ranks."""
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_size
    if micro_batches >= stages:
        return
    share = bubble(stages, virtual, micro_batches)
    raise ConfigError(
        f"{micro_batches} micro-batch(es) for --pipeline-model-parallel-size {stages}: each rank would wait "
        f"{100 * share:.0f} % of the time",
        fix=f"raise --global-batch-size to {unit * stages} or more, or lower the number of stages",
    )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return world size / (context · pipeline parallel). Raises ConfigError if it is not an integer."""
    stages, context = parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    size = stages * context
    if world_size % size and stages > 1:
        raise ConfigError(
            f"{world_size} rank(s) cannot be split into groups of {stages} stages times "
            f"--context-parallel-size {context}",
            where="--pipeline-model-parallel-size",
            fix=f"start a multiple of {size} ranks, or lower one of them",
        )
    if world_size % size:
        raise ConfigError(
            f"{world_size} rank(s) cannot be split into groups of {size}",
            where="--context-parallel-size",
            fix=f"start a multiple of {size} ranks, or lower it",
        )
    return world_size // size
