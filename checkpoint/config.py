"""Settings of conversions. Each field is a `--cfg.…` flag. Does not import torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mindspeed_mm.config.schema import Config


class TargetParallelConfig(Config):
    """How the converted weights are split."""

    pp_layers: list[int] | list[list[int]] = Field(
        default=[],
        description="layers per pipeline stage, such as '[7,8,8,7]'; with virtual stages, a list of lists "
        "with one list per chunk; [] = one file",
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
    """Settings to convert a sharded checkpoint to one torch file."""

    source_path: str = Field(
        min_length=1, description="iter_ folder of a run, or the run's folder (the tracker file's iteration)"
    )
    target_path: str = Field(
        min_length=1, description="a .pt or .pth file, or a folder that gets release/ and a tracker file"
    )


class ConvertConfig(ChecksumConfig):
    """The settings of every conversion."""

    source_path: str = Field(
        min_length=1, description="folder or file with the weights; the format is detected"
    )
    target_path: str = Field(min_length=1, description="folder or file to write; parent folders are created")
    dtype: Literal["source", "bf16", "fp32"] = Field(
        default="source", description="dtype of the written weights"
    )
    verify: Literal["heads", "bits"] = Field(
        default="heads",
        description="what to verify: heads (names, shapes and 64 KiB of each weight) or bits (every bit)",
    )


class ToMmConfig(ConvertConfig):
    """Settings to convert original or diffusers weights to an MM folder."""

    base_path: str | None = Field(
        default=None,
        description="weights of the trunk if source_path contains only a VACE module, or moved base weights",
    )
    target_parallel_config: TargetParallelConfig = Field(
        default=TargetParallelConfig(), description="pipeline stages"
    )


class FromMmConfig(ConvertConfig):
    """Settings to convert an MM or DCP folder to original or diffusers weights."""

    form: Literal["whole", "module"] = Field(
        default="whole",
        description="whole: the whole model; module: only the VACE branch, one .safetensors file for ComfyUI",
    )
    base_path: str | None = Field(
        default=None,
        description="new path of the base weights of a trainable-only checkpoint, if they were moved",
    )
    max_shard_gb: float = Field(
        default=10.0, gt=0, description="maximum size of a file in a folder, in GB (10^9 bytes)"
    )


class ResplitConfig(ToMmConfig):
    """Settings to convert an MM folder to other pipeline stages."""


class LoraToConfig(ChecksumConfig):
    """Settings to convert a LoRA of any dialect, or of a training checkpoint, for another program."""

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
            "weights of its base; needed for a LoRA of an unpublished model, and to write modules_to_save "
            "for ComfyUI"
        ),
    )
    expert: Literal["high", "low"] | None = Field(
        default=None, description="expert of A14B, if the source contains LoRAs of both"
    )


class ExtractLoraConfig(ChecksumConfig):
    """Settings to extract a LoRA that approximates the difference of two checkpoints of one model."""

    source_path: str = Field(
        min_length=1, description="fine-tuned weights, any dialect, or a training checkpoint"
    )
    base_path: str = Field(min_length=1, description="weights before fine-tuning")
    target_path: str = Field(min_length=1, description=".safetensors file, or a folder for form peft")
    rank: int = Field(
        default=32,
        gt=0,
        le=4096,
        description="rank of each layer; a higher rank keeps more of the difference",
    )
    on: Literal["branch", "trunk", "both"] = Field(default="both", description="part of the model to compare")
    form: Literal["comfyui", "peft", "diffusers"] = Field(
        default="comfyui",
        description="program to write for; only comfyui stores differences without a low rank (biases)",
    )
    dtype: Literal["bf16", "fp32"] = Field(default="bf16", description="dtype of the written matrices")
    report: str | None = Field(
        default=None, description="JSON file to write, with the error of each layer and the total error"
    )


class MergeLoraConfig(ConvertConfig):
    """Settings to merge LoRAs into base weights."""

    loras: list[str] | str = Field(
        description=(
            "LoRA files, folders or training checkpoints; one path, or '[a.safetensors, b.safetensors]'"
        )
    )
    strengths: list[float] | float = Field(
        default=1.0, description="factor for each LoRA: one number for all, or one per LoRA"
    )
    expert: Literal["high", "low"] | None = Field(
        default=None, description="expert of A14B that the base is, if a LoRA file contains both"
    )
    form: Literal["source", "official", "diffusers", "mm", "module"] = Field(
        default="source",
        description="names to write; source: those of the base; module: only the VACE branch, for ComfyUI",
    )
    base_path: str | None = Field(
        default=None,
        description="new path of the base weights of a trainable-only checkpoint, if they were moved",
    )
    target_parallel_config: TargetParallelConfig = Field(
        default=TargetParallelConfig(), description="pipeline stages, for form mm"
    )
    max_shard_gb: float = Field(
        default=10.0, gt=0, description="maximum size of a file in a folder, in GB (10^9 bytes)"
    )

    @field_validator("loras", mode="before")
    @classmethod
    def _without_quotes(cls, value: Any) -> Any:
        """Parse `[a.safetensors, b.safetensors]` without quotes, like mm-convert. JSON would need quotes."""
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            return [word.strip() for word in value[1:-1].split(",")]
        return value


class PipelineConfig(ChecksumConfig):
    """Settings to assemble a WanVACEPipeline folder of diffusers."""

    target_path: str = Field(min_length=1, description="folder to write")
    high_path: str = Field(
        description="weights of the high-noise expert of A14B, or of the only transformer, any dialect"
    )
    low_path: str | None = Field(default=None, description="weights of the low-noise expert of A14B")
    vae_path: str = Field(description="Wan2.1_VAE.pth or a diffusers vae folder")
    text_encoder_path: str = Field(description="models_t5_umt5-xxl-enc-bf16.pth or a text_encoder folder")
    tokenizer_path: str | None = Field(
        default=None, description="tokenizer folder (default: next to the text encoder)"
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
        description="new path of the base weights of a trainable-only checkpoint, if they were moved",
    )
    max_shard_gb: float = Field(default=10.0, gt=0, description="maximum size of a file, in GB (10^9 bytes)")
