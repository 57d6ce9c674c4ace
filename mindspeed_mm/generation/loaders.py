"""Finds the models of a pipeline in a downloaded folder, and loads them."""

from __future__ import annotations

from pathlib import Path

import torch

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import read_json_object
from mindspeed_mm.generation.config import Offload, WeightPaths
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.parallel import SINGLE, ContextParallel, SingleProcess
from mindspeed_mm.models.load_model import load_transformer, open_model
from mindspeed_mm.models.spec import generating_spec
from mindspeed_mm.models.umt5 import encoder
from mindspeed_mm.models.umt5.encoder import TextEncoder
from mindspeed_mm.models.wan import vae
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.vae import WanVae
from mindspeed_mm.ops.quantized import QuantFormat

_EXPERTS = ("high_noise_model", "low_noise_model")


class _Named(Config):
    """The part of an inference JSON that names the weights."""

    model: WeightPaths


def resolve_model_dir(folder: str | Path) -> WeightPaths:
    """Find the weights in an official folder (1.3B, 14B, A14B), a diffusers folder or an inference JSON.

    Raises WeightsError with what is missing, and ConfigError for an invalid JSON.
    """
    root = Path(folder)
    if root.suffix == ".json" and root.is_file():
        model = {key: value for key, value in read_json_object(root).items() if key == "model"}
        return parse(_Named, model, str(root)).model
    if not root.is_dir():
        raise WeightsError(
            "no such folder",
            where=root,
            fix="use a model folder, an inference JSON, or the parts (WeightPaths)",
        )
    transformer = _diffusers_transformers(root) or _official_transformers(root)
    if not transformer:
        raise WeightsError(
            "folder contains no transformer",
            where=root,
            expected=f"diffusion_pytorch_model*.safetensors, transformer/, or {' and '.join(_EXPERTS)}",
        )
    return WeightPaths(transformer=transformer, vae=str(root), text_encoder=str(root))


def _diffusers_transformers(root: Path) -> tuple[str, ...]:
    names = ("transformer", "transformer_2")
    return tuple(str(root / name) for name in names if (root / name).is_dir())


def _official_transformers(root: Path) -> tuple[str, ...]:
    if all((root / name).is_dir() for name in _EXPERTS):
        return tuple(str(root / name) for name in _EXPERTS)
    return (str(root),) if any(root.glob("diffusion_pytorch_model*.safetensors")) else ()


def load_experts(
    paths: WeightPaths,
    dtype: torch.dtype,
    accelerator: Accelerator,
    offload: Offload,
    parallel: SingleProcess = SINGLE,
    *,
    shard: bool = False,
    quantize: QuantFormat | None = None,
) -> Experts:
    """Load all transformers.

    They are loaded on the host and then placed as `offload` requires or, with `shard`, sharded across the
    processes of `parallel`. `quantize` is the storage format of the linear layers in the blocks. Raises
    WeightsError.
    """
    spec = generating_spec(paths.model_id, "model.model_id")
    files = [_one_or_many(shards) for shards in paths.experts]
    if shard and isinstance(parallel, ContextParallel):
        return Experts(
            [parallel.load_sharded(open_model(file, spec), dtype, quantize, spec) for file in files],
            accelerator,
            placed=True,
            dtype=dtype,
        )
    models = [
        load_transformer(file, dtype=dtype, quantize=quantize, spec=spec).requires_grad_(False)
        for file in files
    ]
    if isinstance(parallel, ContextParallel):
        for model in models:
            parallel.share_tokens(model)
    return Experts(models, accelerator, offload)


def inspect_experts(paths: WeightPaths) -> VaceConfig:
    """Read the headers of all transformers, log what was found, and return their sizes.

    Raises WeightsError, and ConfigError for a model that cannot generate.
    """
    spec = generating_spec(paths.model_id, "model.model_id")
    found = [open_model(_one_or_many(shards), spec).sizes for shards in paths.experts]
    if any(sizes != found[0] for sizes in found):
        raise WeightsError("the two experts have different sizes", expected="the two halves of one model")
    return found[0]


def load_text_encoder(
    paths: WeightPaths, dtype: torch.dtype, accelerator: Accelerator, text_len: int
) -> TextEncoder:
    """Load the text encoder on the device. It truncates prompts to `text_len` tokens. Raises WeightsError."""
    tokenizer = None if paths.tokenizer is None else Path(paths.tokenizer)
    return encoder.load_text_encoder(
        Path(paths.text_encoder), tokenizer, dtype=dtype, device=accelerator.device, text_len=text_len
    )


def load_vae(paths: WeightPaths, dtype: torch.dtype, accelerator: Accelerator) -> WanVae:
    """Load the VAE on the device. Raises WeightsError."""
    return vae.load_vae(Path(paths.vae), dtype=dtype, device=accelerator.device)


def _one_or_many(shards: tuple[str, ...]) -> Path | list[Path]:
    return Path(shards[0]) if len(shards) == 1 else [Path(shard) for shard in shards]
