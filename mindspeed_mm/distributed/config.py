"""How ranks share the work: parallel sizes, FSDP2 and recompute flags. Each field is a flag. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config


class ParallelConfig(Config):
    """Sizes of the process groups, and how parameters and activations are laid over them."""

    tensor_model_parallel_size: int = Field(default=1, gt=0, description="must be 1")
    pipeline_model_parallel_size: int = Field(default=1, gt=0, description="must be 1")
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, gt=0, description="must be 1 or absent")
    context_parallel_size: int = Field(default=1, gt=0, description="ranks that share the tokens of one sample")
    context_parallel_algo: Literal["ulysses_cp_algo"] = Field(
        default="ulysses_cp_algo", description="how they exchange them: all-to-all over heads"
    )
    use_torch_fsdp2: bool = Field(default=False, description="shard parameters, gradients and optimizer (FSDP2)")
    fsdp2_config_path: str | None = Field(default=None, description="YAML that says what is sharded and recomputed")
    distributed_backend: Literal["nccl", "hccl", "gloo"] | None = Field(
        default=None, description="gloo anywhere; nccl and hccl both mean the device's own (default: the device's own)"
    )
    distributed_timeout_minutes: int = Field(default=10, gt=0, description="longest wait for another rank")
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None, description="forget a block's activations (selective: keep attention outputs)"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None, description="uniform: every block; block: the first --recompute-num-layers"
    )
    recompute_num_layers: int | None = Field(default=None, gt=0, description="blocks recomputed by method block")
    use_mindspeed: bool = Field(default=False, description="import MindSpeed's adaptor before megatron.core")

    @model_validator(mode="after")
    def _supported(self) -> ParallelConfig:
        sizes = {
            "tensor-model-parallel-size": self.tensor_model_parallel_size,
            "pipeline-model-parallel-size": self.pipeline_model_parallel_size,
            "virtual-pipeline-model-parallel-size": self.virtual_pipeline_model_parallel_size or 1,
        }
        for flag, size in sizes.items():
            if size != 1:
                raise ValueError(
                    f"--{flag} {size} is not supported; set it to 1 and use --use-torch-fsdp2 for memory, "
                    "--context-parallel-size for long clips"
                )
        return self
