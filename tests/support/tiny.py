"""Tiny models and checkpoint folders for all tests.

The makers of examples/vace/tiny under the names that tests use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.vace.tiny.checkpoints import (
    TEXT_FILE,
    TINY,
    TOKENIZER_FOLDER,
    TRANSFORMER_FILE,
    VAE_FILE,
    make_transformer,
    make_umt5,
    make_vae,
    official_config,
    randomize,
    write_official,
    write_tokenizer,
    write_transformer,
    write_umt5,
    write_vae,
)
from mindspeed_mm.models.wan.config import VaceConfig
from mindspeed_mm.models.wan.vace import VaceTransformer

__all__ = [
    "TEXT_FILE",
    "TINY",
    "TOKENIZER_FOLDER",
    "TRANSFORMER_FILE",
    "VAE_FILE",
    "model_json",
    "official_config",
    "randomize",
    "tiny_inputs",
    "tiny_transformer",
    "tiny_umt5",
    "tiny_vae",
    "write_official",
    "write_shards",
    "write_tokenizer",
    "write_transformer",
    "write_umt5",
    "write_vae",
]

tiny_vae = make_vae
tiny_umt5 = make_umt5


def tiny_transformer(seed: int = 0, config: VaceConfig = TINY) -> VaceTransformer:
    """A transformer whose weights are random and nowhere zero, fp32, on the CPU."""
    return make_transformer(config, seed)


def tiny_inputs(
    seed: int = 0,
    *,
    batch: int = 1,
    frames: int = 3,
    height: int = 6,
    width: int = 10,
    text: int = 5,
    config: VaceConfig = TINY,
) -> dict[str, Tensor]:
    """Return random inputs of `VaceTransformer.forward`, by name. Timesteps differ by sample."""
    generator = torch.Generator().manual_seed(seed)
    grid = (frames, height, width)
    return {
        "latents": torch.randn(batch, config.trunk.in_dim, *grid, generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
        "prompt_embeds": torch.randn(batch, text, config.trunk.text_dim, generator=generator),
        "vace_context": torch.randn(batch, config.vace_in_dim, *grid, generator=generator),
    }


def model_json() -> dict[str, Any]:
    """A model JSON of these sizes, as one edits it.

    bf16 as the shipped fsdp2_config.yaml wants, no weights named yet.
    """
    trunk = TINY.trunk
    sizes = ("hidden_size", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "freq_dim")
    predictor = {name: getattr(trunk, name) for name in sizes}
    branch = {"in_dim": TINY.vace_in_dim, "vace_layers": list(TINY.vace_layers)}
    return {
        "task": "vace",
        "diffusion": {"model_id": "wan_flow_match_scheduler", "shift": 5},
        "caption_dropout": 0.1,
        "predictor": {
            "model_id": "vace",
            "dtype": "bf16",
            "trainable": "branch",
            **predictor,
            "vace_dit": branch,
        },
    }


def write_shards(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Three safetensors files with an index, as the big models are published."""
    names, where = list(weights), {}
    for part in range(3):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[part::3]}, folder / file)
        where.update(dict.fromkeys(names[part::3], file))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def write_shipped_request(path: Path, **keys: Any) -> Path:
    """The inference JSON of the shipped tiny weights with absolute paths; `keys` replace its own."""
    tiny = Path(__file__).resolve().parents[2] / "examples/vace/tiny"
    weights = str(tiny / "weights")
    model = {"transformer": [f"{weights}/vace"], "vae": weights, "text_encoder": weights}
    request = json.loads((tiny / "inference.json").read_text())
    path.write_text(json.dumps({**request, "model": model, **keys}))
    return path
