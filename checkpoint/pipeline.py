"""A whole WanVACEPipeline folder of diffusers out of its parts: one or two transformers, VAE, text encoder, tokenizer, scheduler."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from transformers import AutoTokenizer

from checkpoint.config import ConvertConfig, PipelineConfig
from checkpoint.convert import cast, hf_target, read_back, write
from checkpoint.layout import replace_entries, staging
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.umt5.tokenizer import find_tokenizer
from mindspeed_mm.models.wan.vae import load_vae
from mindspeed_mm.models.weights import open_weights

logger = get_logger(__name__)
INDEX = "model_index.json"
OWNED = ("scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae", INDEX)


def assemble(cfg: PipelineConfig) -> None:
    """Write the folder and move it into place. Raises WeightsError when a part does not fit; the target stays as it was."""
    target = Path(cfg.target_path)
    if target.is_file():
        raise WeightsError(f"{target}: is a file; give a folder as target_path")
    experts = {"transformer": cfg.high_path} | ({"transformer_2": cfg.low_path} if cfg.low_path else {})
    with staging(target, "folder", owned=OWNED, last=INDEX) as place:
        new = place / "new"
        new.mkdir()
        for part, path in experts.items():
            _write_expert(path, new / part, cfg)
        load_vae(Path(cfg.vae_path)).model.save_pretrained(new / "vae")
        words = Path(cfg.tokenizer_path) if cfg.tokenizer_path else find_tokenizer(Path(cfg.text_encoder_path))
        encoder = load_text_encoder(
            Path(cfg.text_encoder_path), words, dtype=torch.bfloat16, device="cpu"
        )  # reads it too
        encoder.model.save_pretrained(new / "text_encoder")
        tokenizer = AutoTokenizer.from_pretrained(str(words), local_files_only=True, trust_remote_code=False)
        tokenizer.save_pretrained(new / "tokenizer")
        shift = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": cfg.shift}
        UniPCMultistepScheduler(**shift).save_pretrained(new / "scheduler")
        parts = {
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", type(encoder.model).__name__],
            "tokenizer": ["transformers", type(tokenizer).__name__],
            **{part: ["diffusers", "WanVACETransformer3DModel"] for part in experts},
            "vae": ["diffusers", "AutoencoderKLWan"],
        }
        (new / INDEX).write_text(json.dumps(_index(parts, cfg), indent=2) + "\n", encoding="utf-8")
        replace_entries(new, place, target, OWNED, last=INDEX)
    logger.info(f"{target}: a WanVACEPipeline of {', '.join(parts)}")


def _index(parts: dict[str, list[str]], cfg: PipelineConfig) -> dict[str, object]:
    version = importlib.metadata.version("diffusers")
    head: dict[str, object] = {"_class_name": "WanVACEPipeline", "_diffusers_version": version}
    second = {} if cfg.low_path else {"transformer_2": [None, None]}
    return {**head, "boundary_ratio": cfg.boundary if cfg.low_path else None, **parts, **second}


def _write_expert(path: str, folder: Path, cfg: PipelineConfig) -> None:
    source = cast(open_weights(path, base_path=cfg.base_path), cfg.dtype)
    logger.info(source.description)
    if not source.has_branch:
        raise WeightsError(f"{path}: has no VACE branch; give the weights of a VACE expert")
    plan = ConvertConfig(source_path=path, target_path=str(folder), dtype=cfg.dtype)
    write(folder, hf_target(source, plan, "diffusers", cfg.max_shard_gb))
    read_back(folder, source, bits=False)
