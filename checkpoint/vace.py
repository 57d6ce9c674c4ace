"""The methods of VACEConverter. Each method is named after the dialect it reads and the form it writes."""

from __future__ import annotations

from pathlib import Path

from checkpoint.config import (
    DcpToTorchConfig,
    ExtractLoraConfig,
    FromMmConfig,
    LoraToConfig,
    MergeLoraConfig,
    PipelineConfig,
    ResplitConfig,
    ToMmConfig,
)
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.locks import check_unlocked
from mindspeed_mm.models.containers.checksums import verifying
from mindspeed_mm.outputs import check_file, check_folder

FILES = (".pt", ".pth", ".safetensors")


def check_target(path: str) -> None:
    """Check a target without torch.

    Raises ConfigError if the target cannot be written, and LaunchError if it is in use.
    """
    if Path(path).suffix in FILES:
        check_file(path, "target_path")
        return
    check_folder(path, "target_path")
    check_unlocked(Path(path), choose="target_path")


def hf_to_mm(cfg: ToMmConfig) -> None:
    """Convert original Wan weights (one file or shards) to an MM folder. Convert each A14B expert separately.

    Args:
        cfg: source, target, dtype, pipeline stages.
    """
    check_target(cfg.target_path)
    from checkpoint.convert import convert, open_source
    from checkpoint.target import mm_target

    with verifying(cfg.verify_checksums):
        source = open_source(cfg, dialects=("official",), method="hf_to_mm", base_path=cfg.base_path)
        convert(source, mm_target(source, cfg, cfg.target_parallel_config.pp_layers), cfg, "hf_to_mm")


def hf_diffusers_to_mm(cfg: ToMmConfig) -> None:
    """Convert diffusers weights (the pipeline's folder or its transformer/) to an MM folder.

    Args:
        cfg: source, target, dtype, pipeline stages.
    """
    check_target(cfg.target_path)
    from checkpoint.convert import convert, open_source
    from checkpoint.target import mm_target

    with verifying(cfg.verify_checksums):
        source = open_source(
            cfg, dialects=("diffusers",), method="hf_diffusers_to_mm", base_path=cfg.base_path
        )
        convert(
            source, mm_target(source, cfg, cfg.target_parallel_config.pp_layers), cfg, "hf_diffusers_to_mm"
        )


def mm_to_hf(cfg: FromMmConfig) -> None:
    """Convert MM or DCP weights to original Wan names: a folder, or one .pt, .pth or .safetensors file.

    Args:
        cfg: source, target, dtype, base of a trainable-only checkpoint.
    """
    check_target(cfg.target_path)
    from checkpoint.convert import convert, open_source, write_module
    from checkpoint.target import hf_target

    with verifying(cfg.verify_checksums):
        source = open_source(cfg, dialects=("mm",), method="mm_to_hf", base_path=cfg.base_path)
        if cfg.form == "module":
            write_module(source, cfg, "mm_to_hf")
            return
        convert(source, hf_target(source, cfg, "official", cfg.max_shard_gb), cfg, "mm_to_hf")


def mm_to_hf_diffusers(cfg: FromMmConfig) -> None:
    """Convert MM or DCP weights to a diffusers transformer folder, or one file with diffusers names.

    Args:
        cfg: source, target, dtype, base of a trainable-only checkpoint.
    """
    check_target(cfg.target_path)
    if cfg.form == "module":
        raise ConfigError(
            "a module file has official names", where="mm_to_hf_diffusers: form", fix="use mm_to_hf"
        )
    from checkpoint.convert import convert, open_source
    from checkpoint.target import hf_target

    with verifying(cfg.verify_checksums):
        source = open_source(cfg, dialects=("mm",), method="mm_to_hf_diffusers", base_path=cfg.base_path)
        convert(source, hf_target(source, cfg, "diffusers", cfg.max_shard_gb), cfg, "mm_to_hf_diffusers")


def resplit(cfg: ResplitConfig) -> None:
    """Convert MM or DCP weights to an MM folder with other pipeline stages; without pp_layers, to one file.

    Args:
        cfg: source, target, dtype, pipeline stages.
    """
    check_target(cfg.target_path)
    from checkpoint.convert import convert, open_source
    from checkpoint.target import mm_target

    with verifying(cfg.verify_checksums):
        source = open_source(cfg, dialects=("mm",), method="resplit", base_path=cfg.base_path)
        convert(source, mm_target(source, cfg, cfg.target_parallel_config.pp_layers), cfg, "resplit")


def dcp_to_torch(cfg: DcpToTorchConfig) -> None:
    """Convert a run's sharded checkpoint to one torch file, like torch's dcp_to_torch.

    No code in the checkpoint is run.

    Args:
        cfg: source; a .pt or .pth file, or a folder that becomes an MM checkpoint, as target.
    """
    check_target(cfg.target_path)
    from checkpoint.dcp import gather

    with verifying(cfg.verify_checksums):
        gather(cfg)


def assemble_pipeline(cfg: PipelineConfig) -> None:
    """Assemble A14B's experts (or one transformer), VAE and text encoder in a diffusers pipeline folder.

    Args:
        cfg: the parts, in any known dialect, and the target.
    """
    check_target(cfg.target_path)
    from checkpoint.pipeline import assemble

    with verifying(cfg.verify_checksums):
        assemble(cfg)


def merge_lora(cfg: MergeLoraConfig) -> None:
    """Merge LoRAs, times their strengths, into base weights of any dialect.

    Args:
        cfg: base as source, target, LoRAs, strengths, names to write.
    """
    check_target(cfg.target_path)
    from checkpoint.lora import merge

    with verifying(cfg.verify_checksums):
        merge(cfg)


def lora_to_peft(cfg: LoraToConfig) -> None:
    """Convert a LoRA of any dialect, or of a training checkpoint, to a peft folder.

    Args:
        cfg: source, target, dtype, base of an unpublished model.
    """
    check_target(cfg.target_path)
    from checkpoint.lora import write_peft

    with verifying(cfg.verify_checksums):
        write_peft(cfg)


def lora_to_comfyui(cfg: LoraToConfig) -> None:
    """Convert a LoRA of any dialect, or of a training checkpoint, to one file for ComfyUI.

    Args:
        cfg: source, target, dtype, base of an unpublished model.
    """
    check_target(cfg.target_path)
    from checkpoint.lora import write_comfyui

    with verifying(cfg.verify_checksums):
        write_comfyui(cfg)


def lora_to_diffusers(cfg: LoraToConfig) -> None:
    """Convert a LoRA of any dialect, or of a training checkpoint, to one file for diffusers.

    Args:
        cfg: source, target, dtype, base of an unpublished model.
    """
    check_target(cfg.target_path)
    from checkpoint.lora import write_diffusers

    with verifying(cfg.verify_checksums):
        write_diffusers(cfg)


def lora_to_hf(cfg: LoraToConfig) -> None:
    """Convert a LoRA of any dialect, or of a training checkpoint, to a peft folder or a file for diffusers.

    Args:
        cfg: source, target (its suffix decides the form), dtype, base of an unpublished model.
    """
    check_target(cfg.target_path)
    from checkpoint.lora import write_hf

    with verifying(cfg.verify_checksums):
        write_hf(cfg)


def extract_lora(cfg: ExtractLoraConfig) -> None:
    """Extract the difference of two checkpoints of one model as a LoRA, and report each layer's error.

    Args:
        cfg: fine-tuned weights as source, base, target, rank, part, program.
    """
    check_target(cfg.target_path)
    from checkpoint.extract import extract

    with verifying(cfg.verify_checksums):
        extract(cfg)
