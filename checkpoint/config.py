"""The settings of a conversion. Their fields are the `--cfg.…` flags. Does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mindspeed_mm.config.schema import Config


class TargetParallelConfig(Config):
    """How the converted weights are split."""

    pp_layers: list[int] | list[list[int]] = Field(
        default=[],
        description="layers of each pipeline stage, e.g. '[7,8,8,7]'; a list of lists has one list for "
        "each virtual chunk; [] = one file",
    )


class ChecksumConfig(Config):
    """The settings of every method."""

    dry_run: bool = Field(
        default=False, description="open the source, plan the target, and stop; nothing is written"
    )
    verify_checksums: bool = Field(
        default=True,
        description="verify the checksums in the files that are read; files without any are read too",
    )
    allow_nonfinite: bool = Field(
        default=False, description="convert weights that contain NaN or Inf too, with a warning"
    )


class DcpToTorchConfig(ChecksumConfig):
    """Sharded checkpoint → one torch file."""

    source_path: str = Field(
        min_length=1, description="iter_ folder of a run, or the run's folder (the tracker file's iteration)"
    )
    target_path: str = Field(
        min_length=1, description="a .pt or .pth file, or a folder that gets release/ and a tracker file"
    )


class ConvertConfig(ChecksumConfig):
    """The settings of every conversion."""

    source_path: str = Field(
        min_length=1, description="folder or file with the weights; what is in it decides how it is read"
    )
    target_path: str = Field(min_length=1, description="folder or file to write; parents are made")
    dtype: Literal["source", "bf16", "fp32"] = Field(
        default="source", description="dtype of the written weights"
    )
    verify: Literal["heads", "bits"] = Field(
        default="heads",
        description="what is read back: names, shapes and 64 KiB of each weight, or every bit",
    )


class ToMmConfig(ConvertConfig):
    """Original or diffusers weights → MM folder."""

    base_path: str | None = Field(
        default=None,
        description="the trunk's weights, where source_path is a VACE module alone; or where they moved to",
    )
    target_parallel_config: TargetParallelConfig = Field(
        default=TargetParallelConfig(), description="pipeline stages"
    )


class FromMmConfig(ConvertConfig):
    """MM or DCP folder → original or diffusers weights."""

    form: Literal["whole", "module"] = Field(
        default="whole",
        description="the whole model, or one .safetensors file of the VACE branch alone, as ComfyUI takes it",
    )
    base_path: str | None = Field(
        default=None,
        description="weights that a checkpoint of the trained part is completed from, if they moved",
    )
    max_shard_gb: float = Field(
        default=10.0, gt=0, description="most GB (10^9 bytes) of one file of a folder"
    )


class ResplitConfig(ToMmConfig):
    """MM folder → MM folder with other stages."""


class LoraToConfig(ChecksumConfig):
    """A LoRA of any dialect, or of a training checkpoint → a LoRA of another program."""

    source_path: str = Field(
        min_length=1,
        description="LoRA file or folder of any dialect, or a checkpoint of a run that trains one",
    )
    target_path: str = Field(min_length=1, description="folder (peft) or .safetensors file to write")
    dtype: Literal["source", "bf16", "fp32"] = Field(
        default="source", description="dtype of the written matrices; alpha is always fp32"
    )
    base_path: str | None = Field(
        default=None,
        description=(
            "weights of its base: for a LoRA of a model that is not published, and to write modules_to_save "
            "for ComfyUI"
        ),
    )
    expert: Literal["high", "low"] | None = Field(
        default=None, description="expert of A14B, where the source holds LoRAs of both"
    )


class ExtractLoraConfig(ChecksumConfig):
    """Two checkpoints of one model → a LoRA that approximates their difference."""

    source_path: str = Field(
        min_length=1, description="fine-tuned weights, any dialect, or a training checkpoint"
    )
    base_path: str = Field(min_length=1, description="the weights that they started from")
    target_path: str = Field(min_length=1, description=".safetensors file, or a folder for form peft")
    rank: int = Field(
        default=32, gt=0, le=4096, description="rank of each layer; more keeps more of the difference"
    )
    on: Literal["branch", "trunk", "both"] = Field(default="both", description="part that is compared")
    form: Literal["comfyui", "peft", "diffusers"] = Field(
        default="comfyui",
        description="program to write for; comfyui alone holds what has no low rank, such as biases",
    )
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="dtype of the written matrices")
    report: str | None = Field(
        default=None, description="JSON file to write, with the error of each layer and of all"
    )


class MergeLoraConfig(ConvertConfig):
    """Base weights and LoRAs → merged weights."""

    loras: list[str] | str = Field(
        description=(
            "LoRA files, folders or training checkpoints; one path, or '[a.safetensors, b.safetensors]'"
        )
    )
    strengths: list[float] | float = Field(
        default=1.0, description="what each LoRA is multiplied by: one number for all, or one for each"
    )
    expert: Literal["high", "low"] | None = Field(
        default=None, description="expert of A14B that the base is, where a LoRA file holds both"
    )
    form: Literal["source", "official", "diffusers", "mm", "module"] = Field(
        default="source",
        description="names to write; default: those of the base; module: the VACE branch alone, for ComfyUI",
    )
    base_path: str | None = Field(
        default=None,
        description="weights that a checkpoint of the trained part is completed from, if they moved",
    )
    target_parallel_config: TargetParallelConfig = Field(
        default=TargetParallelConfig(), description="pipeline stages, for form mm"
    )
    max_shard_gb: float = Field(
        default=10.0, gt=0, description="most GB (10^9 bytes) of one file of a folder"
    )

    @field_validator("loras", mode="before")
    @classmethod
    def _without_quotes(cls, value: Any) -> Any:
        """Parse `[a.safetensors, b.safetensors]` without quotes, like mm-convert. JSON would need quotes."""
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            return [word.strip() for word in value[1:-1].split(",")]
        return value


class PipelineConfig(ChecksumConfig):
    """Parts → a WanVACEPipeline folder of diffusers."""

    target_path: str = Field(min_length=1, description="folder to write")
    high_path: str = Field(
        description="weights of the high-noise expert of A14B, or of the only transformer, any dialect"
    )
    low_path: str | None = Field(default=None, description="weights of the low-noise expert of A14B")
    vae_path: str = Field(description="Wan2.1_VAE.pth or a diffusers vae folder")
    text_encoder_path: str = Field(description="models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder")
    tokenizer_path: str | None = Field(
        default=None, description="tokenizer folder; by default beside the text encoder"
    )
    boundary: float = Field(
        default=0.875, gt=0, lt=1, description="sigma at which the low-noise expert takes over"
    )
    shift: float = Field(
        default=12.0, gt=0, description="flow_shift of the scheduler (12 for A14B, 16 for Wan2.1)"
    )
    dtype: Literal["source", "bf16", "fp32"] = Field(
        default="source", description="dtype of the transformers"
    )
    base_path: str | None = Field(
        default=None,
        description="weights that a checkpoint of the trained part is completed from, if they moved",
    )
    max_shard_gb: float = Field(default=10.0, gt=0, description="most GB (10^9 bytes) of one file")
