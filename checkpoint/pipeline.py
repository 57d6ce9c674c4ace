"""Assembles a WanVACEPipeline folder of diffusers.

Its parts are one or two transformers, the VAE, text encoder, tokenizer and scheduler.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from checkpoint.config import ConvertConfig, PipelineConfig
from checkpoint.convert import cast
from checkpoint.layout import check_space, replace_entries, staging, writing
from checkpoint.target import hf_target
from checkpoint.write import read_back, write_finite
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.log import get_logger, log_table
from mindspeed_mm.models.loading import fingerprint
from mindspeed_mm.models.source import WeightsSource
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.umt5.tokenizer import find_tokenizer
from mindspeed_mm.models.wan.vae import load_vae
from mindspeed_mm.models.weights import open_weights
from mindspeed_mm.processes import deferred
from mindspeed_mm.progress import Progress, size_text

logger = get_logger(__name__)
INDEX = "model_index.json"
OWNED = ("scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae", INDEX)


@dataclass(frozen=True)
class Parts:
    """The opened and checked parts of the folder, before they are written."""

    experts: Mapping[str, WeightsSource]  # folder name → weights
    modules: Mapping[str, Any]  # folder name → object of diffusers or transformers
    vocabulary: str  # fingerprint of the tokenizer

    @property
    def nbytes(self) -> int:
        """The size of all weights in bytes."""
        experts = sum(tensor.nbytes for source in self.experts.values() for tensor in source.tensors.values())
        return experts + sum(_nbytes(module) for module in self.modules.values())


def assemble(cfg: PipelineConfig) -> None:
    """Write the folder and move it into place.

    If a part does not fit, raises WeightsError and leaves the target unchanged.
    """
    target = Path(cfg.target_path)
    if target.is_file():
        raise WeightsError("is a file", where=target, fix="use a folder as target_path")
    parts = open_parts(cfg)
    _log_table(parts, cfg)
    if cfg.dry_run:
        check_space(target, parts.nbytes)
        logger.info(f"{target}: {', '.join([*parts.experts, *parts.modules])} would be written")
        return
    with writing(target), staging(target, "folder", owned=OWNED, last=INDEX) as place:
        check_space(target, parts.nbytes)
        new = place / "new"
        new.mkdir()
        with Progress(f"writing {target}", parts.nbytes, "B") as progress:
            for name, source in parts.experts.items():
                plan = ConvertConfig(
                    source_path=str(source.path), target_path=str(new / name), dtype=cfg.dtype
                )
                files = hf_target(source, plan, "diffusers", cfg.max_shard_gb)
                write_finite(new / name, files, str(source.path), cfg.allow_nonfinite, progress.step)
                read_back(new / name, source, bits=False)
            transformers_logging.disable_progress_bar()  # our own bar covers all parts
            for name, module in parts.modules.items():
                module.save_pretrained(new / name)
                progress.step(_nbytes(module))
        _read_back_modules(new, parts)
        (new / INDEX).write_text(json.dumps(_index(parts, cfg), indent=2) + "\n", encoding="utf-8")
        with deferred():  # a signal must not interrupt the replacement
            replace_entries(new, place, target, OWNED, last=INDEX)
    logger.info(f"{target}: a WanVACEPipeline of {', '.join([*parts.experts, *parts.modules])}")


def _log_table(parts: Parts, cfg: PipelineConfig) -> None:
    log_table(
        [
            ("method", "assemble_pipeline"),
            *((name, source.description) for name, source in parts.experts.items()),
            ("vae", cfg.vae_path),
            ("text_encoder", cfg.text_encoder_path),
            ("tokenizer", cfg.tokenizer_path or "next to the text encoder"),
            ("scheduler", f"UniPC, shift {cfg.shift:g}" + ((
                f", boundary {cfg.boundary:g}"
            ) if cfg.low_path else "")),
            ("weights", (f"{size_text(parts.nbytes)}, transformers in "
                f"{'their dtype' if cfg.dtype == 'source' else cfg.dtype}")),
            ("checksums", "verified" if cfg.verify_checksums else "not verified"),
            ("output", cfg.target_path),
        ]
    )  # fmt: skip


def open_parts(cfg: PipelineConfig) -> Parts:
    """Open every part, in any dialect. Raises WeightsError if one is missing, damaged or of another kind."""
    paths = {"transformer": cfg.high_path} | ({"transformer_2": cfg.low_path} if cfg.low_path else {})
    experts = {name: _open_expert(path, cfg) for name, path in paths.items()}
    words = Path(cfg.tokenizer_path) if cfg.tokenizer_path else find_tokenizer(Path(cfg.text_encoder_path))
    # Also reads the tokenizer.
    encoder = load_text_encoder(Path(cfg.text_encoder_path), words, dtype=torch.bfloat16, device="cpu")
    shift = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": cfg.shift}
    modules = {
        "scheduler": UniPCMultistepScheduler(**shift),
        "text_encoder": encoder.model,
        "tokenizer": AutoTokenizer.from_pretrained(
            str(words), local_files_only=True, trust_remote_code=False
        ),
        "vae": load_vae(Path(cfg.vae_path)).model,
    }
    return Parts(experts, modules, encoder.tokenizer.fingerprint)


def _read_back_modules(folder: Path, parts: Parts) -> None:
    """Raise WeightsError unless the VAE, text encoder and tokenizer in `folder` equal the given parts.

    Compares the fingerprints: names, shapes, and the beginning of the data.
    """
    text = load_text_encoder(folder / "text_encoder", folder / "tokenizer", dtype=torch.bfloat16)
    found = {"vae": load_vae(folder / "vae").model, "text_encoder": text.model}
    other = [name for name, net in found.items() if _mark(net) != _mark(parts.modules[name])]
    other += ["tokenizer"] if text.tokenizer.fingerprint != parts.vocabulary else []
    if other:
        raise WeightsError(
            "reads back with different values",
            where=folder / other[0],
            fix="check the disk and convert again",
        )


def _nbytes(module: Any) -> int:
    return sum(weight.nbytes for weight in module.parameters()) if isinstance(module, nn.Module) else 0


def _mark(net: nn.Module) -> str:
    return fingerprint(net.state_dict())


def _open_expert(path: str, cfg: PipelineConfig) -> WeightsSource:
    source = cast(open_weights(path, base_path=cfg.base_path), cfg.dtype)
    if not source.has_branch:
        raise WeightsError("has no VACE branch", where=path, fix="use the weights of a VACE expert")
    return source


def _index(parts: Parts, cfg: PipelineConfig) -> dict[str, object]:
    head = {"_class_name": "WanVACEPipeline", "_diffusers_version": importlib.metadata.version("diffusers")}
    libraries = {"text_encoder": "transformers", "tokenizer": "transformers"}
    classes = {
        **{
            name: [libraries.get(name, "diffusers"), type(module).__name__]
            for name, module in parts.modules.items()
        },
        **{name: ["diffusers", "WanVACETransformer3DModel"] for name in parts.experts},
    }
    second = {} if cfg.low_path else {"transformer_2": [None, None]}
    return {
        **head,
        "boundary_ratio": cfg.boundary if cfg.low_path else None,
        **dict(sorted(classes.items())),
        **second,
    }
