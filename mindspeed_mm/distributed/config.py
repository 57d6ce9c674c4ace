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

_NO_TP = "use --use-torch-fsdp2 or pipeline stages for memory, --context-parallel-size for long clips"


class ParallelConfig(Config):
    """Megatron's parallel flags. Data parallel is what is left: world size / (context · pipeline)."""

    tensor_model_parallel_size: int = Field(default=1, ge=1, description="only 1: FSDP2 shards instead")
    pipeline_model_parallel_size: int = Field(
        default=1, ge=1, le=1000, description="stages: parts of the layers, each on ranks of its own"
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="parts of the layers that each stage's ranks hold, interleaved",
    )
    pipeline_schedule: Literal["1f1b", "gpipe"] = Field(
        default="1f1b",
        description="1f1b (interleaved with virtual stages) keeps few micro-batches in memory, gpipe all",
    )
    context_parallel_size: int = Field(
        default=1, ge=1, le=65536, description="ranks that share the tokens of one sample"
    )
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = Field(
        default="ulysses_cp_algo",
        description="how the tokens are shared: heads are divided (Ulysses), keys and values pass around a "
        "ring (megatron), or both: Ulysses between neighbours, rings between those (hybrid)",
    )
    ulysses_degree_in_cp: int | None = Field(
        default=None, ge=1, le=65536, description="with hybrid_cp_algo: ranks that divide the heads"
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
        if self.tensor_model_parallel_size != 1:
            size = self.tensor_model_parallel_size
            raise ValueError(
                f"--tensor-model-parallel-size {size} is not supported: with the tokens of a video it sends "
                f"more than FSDP2; set it to 1 and {_NO_TP}"
            )
        if self.virtual_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"--virtual-pipeline-model-parallel-size {self.virtual_size} needs "
                "--pipeline-model-parallel-size 2 or more; leave it out, or give both"
            )
        if (self.context_parallel_algo == "hybrid_cp_algo") != (self.ulysses_degree_in_cp is not None):
            raise ValueError("--context-parallel-algo hybrid_cp_algo and --ulysses-degree-in-cp go together")
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
        """Ranks of a context-parallel group that divide the heads; the others form rings."""
        if self.context_parallel_algo == "megatron_cp_algo":
            return 1
        return self.ulysses_degree_in_cp or self.context_parallel_size

    @property
    def virtual_size(self) -> int:
        """Stages of the model on each rank."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def num_stages(self) -> int:
        """Stages of the model on all ranks."""
        return self.pipeline_model_parallel_size * self.virtual_size


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


def check_context_parallel(num_heads: int, ulysses: int, flag: str = "--context-parallel-size") -> None:
    """Ulysses divides heads over `ulysses` ranks. Raises ConfigError naming the sizes that fit."""
    if num_heads % ulysses:
        allowed = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        fix = f"use one of {', '.join(map(str, allowed))}"
        if flag == "--context-parallel-size":
            fix += ", or --context-parallel-algo hybrid_cp_algo with --ulysses-degree-in-cp"
        raise ConfigError(
            f"{ulysses} does not divide the model's {num_heads} attention heads", where=flag, fix=fix
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


def bubble(stages: int, virtual: int, micro_batches: int) -> float:
    """The share of a step in which a rank of a pipeline waits: (p - 1) / (v m + p - 1)."""
    return (stages - 1) / (virtual * micro_batches + stages - 1)


def check_micro_batches(parallel: ParallelConfig, micro_batches: int, unit: int) -> None:
    """Raises ConfigError for fewer micro-batches than stages; one of each rank together is `unit` samples."""
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
    """World size / (context · pipeline parallel). Raises ConfigError when that leaves a remainder."""
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
