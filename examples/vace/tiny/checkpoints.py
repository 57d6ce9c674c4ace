"""Write tiny random VACE weights in the official formats, to try every command on a laptop in seconds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from mindspeed_mm.models.umt5.state_dict import UMT5_KEY_MAP
from mindspeed_mm.models.wan.config import VaceConfig, WanConfig
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.models.wan.vae_state_dict import vae_key_map

TINY = VaceConfig(
    trunk=WanConfig(hidden_size=48, ffn_dim=96, num_heads=4, num_layers=4, text_dim=32, text_len=16),
    vace_layers=(0, 2),
)
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
PIECES = [
    "▁a",
    "▁the",
    "▁of",
    "▁in",
    "▁on",
    "▁red",
    "▁blue",
    "▁green",
    "▁ball",
    "▁cat",
    "▁dog",
    "▁bounces",
    "▁walks",
    "▁runs",
    "▁snow",
    "▁circle",
    "▁bar",
    "▁triangle",
    "▁cross",
    "▁yellow",
    "▁purple",
    "▁moves",
    "▁right",
    "▁left",
    "▁up",
    "▁down",
    "▁over",
    "▁dark",
    "▁light",
    "▁background",
    "▁object",
    "▁grass",
    "▁video",
    "▁camera",
    "ing",
    "ed",
    "er",
    "s",
]
CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-_/%&+"


def randomize(module: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Randomize every weight, none of them zero, so that every path is active; norm weights are near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator) * scale
        is_norm = weight.ndim == 1 and "norm" in name and not name.endswith("bias")
        weight.data = (noise + 1.0 if is_norm or name.endswith("gamma") else noise).to(weight.dtype)


def make_transformer(config: VaceConfig = TINY, seed: int = 0) -> VaceTransformer:
    """A transformer with random weights, fp32."""
    model = VaceTransformer(config)
    randomize(model, seed)
    return model.eval()


def make_vae(seed: int = 0) -> AutoencoderKLWan:
    """The VAE of VACE with narrow layers, fp32; latents keep their 16 channels."""
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    randomize(vae, seed)
    return vae.eval()


def make_umt5(seed: int = 0, width: int = TINY.trunk.text_dim) -> UMT5EncoderModel:
    """A two-layer text encoder for the tokenizer of `write_tokenizer`, fp32."""
    config = UMT5Config(
        vocab_size=len(_vocabulary()),
        d_model=width,
        d_kv=8,
        num_heads=4,
        d_ff=64,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = UMT5EncoderModel(config)
    randomize(encoder, seed, scale=0.2)
    return encoder.eval()


def calmed(encoder: UMT5EncoderModel) -> UMT5EncoderModel:
    """Scale the embeddings up against the layers, so that a word has a similar encoding in any caption."""
    for name, weight in encoder.named_parameters():
        if name.startswith("shared"):
            weight.data *= 5
        elif name.endswith(("SelfAttention.o.weight", "DenseReluDense.wo.weight")):
            weight.data *= 0.25
    return encoder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer folder like google/umt5-xxl's, of a few English words and letters."""
    tokenizer = T5Tokenizer(vocab=_vocabulary(), extra_ids=0)
    tokenizer.save_pretrained(str(folder))


def write_official(
    folder: Path, config: VaceConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a folder laid out like the download: transformer, VAE, text encoder, tokenizer, config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_transformer(folder, make_transformer(config, seed), dtype)
    write_vae(folder / VAE_FILE, make_vae(seed))
    write_umt5(folder / TEXT_FILE, make_umt5(seed, config.trunk.text_dim))
    write_tokenizer(folder / TOKENIZER_FOLDER)
    return folder


def write_transformer(folder: Path, model: VaceTransformer, dtype: torch.dtype = torch.bfloat16) -> None:
    """diffusion_pytorch_model.safetensors and config.json, in the official names and keys."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: weight.to(dtype).contiguous() for name, weight in model.state_dict().items()}
    save_file(state, folder / TRANSFORMER_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(official_config(model.config), indent=2) + "\n")


def official_config(config: VaceConfig) -> dict[str, object]:
    """What the official config.json says of these sizes."""
    trunk = config.trunk
    return {
        "_class_name": "VaceWanModel",
        "model_type": "vace",
        "dim": trunk.hidden_size,
        "ffn_dim": trunk.ffn_dim,
        "num_heads": trunk.num_heads,
        "num_layers": trunk.num_layers,
        "freq_dim": trunk.freq_dim,
        "in_dim": trunk.in_dim,
        "out_dim": trunk.out_dim,
        "text_len": trunk.text_len,
        "eps": trunk.eps,
        "vace_layers": list(config.vace_layers),
        "vace_in_dim": config.vace_in_dim,
    }


def write_vae(path: Path, vae: AutoencoderKLWan) -> None:
    """Wan2.1_VAE.pth: a flat state dict in the official names, fp32."""
    names = vae_key_map(levels=len(vae.config.dim_mult), res_blocks=vae.config.num_res_blocks)
    torch.save({names.to_ours(name): weight for name, weight in vae.state_dict().items()}, path)


def write_umt5(path: Path, encoder: UMT5EncoderModel, dtype: torch.dtype = torch.bfloat16) -> None:
    """models_t5_umt5-xxl-enc-bf16.pth: a flat state dict in the official names."""
    state: dict[str, Tensor] = {
        UMT5_KEY_MAP.to_ours(name): weight.to(dtype)
        for name, weight in encoder.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same tensor as shared.weight
    }
    torch.save(state, path)


def _vocabulary() -> list[tuple[str, float]]:
    """Special tokens, words, then letters: a longer piece is always likelier than its letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return special + [(piece, -3.0) for piece in PIECES] + [(letter, -6.0) for letter in CHARACTERS]


def main() -> None:
    """Write the checkpoint folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write, e.g. ckpt/tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text-only", type=int, metavar="WIDTH", help="only the text encoder, this wide, and its tokenizer"
    )
    arguments = parser.parse_args()
    if arguments.text_only:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_umt5(arguments.folder / TEXT_FILE, calmed(make_umt5(arguments.seed, arguments.text_only)))
        write_tokenizer(arguments.folder / TOKENIZER_FOLDER)
    else:
        write_official(arguments.folder, seed=arguments.seed)


if __name__ == "__main__":
    main()
