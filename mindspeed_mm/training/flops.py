"""How many floating-point operations a training step needs. Formulas: docs/guide/pretrain.md, chapter Throughput."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mindspeed_mm.models.wan.config import VaceConfig

Trainable = Literal["branch", "trunk", "all"]

# dense peak of matrix products, TFLOP/s, from the makers' data sheets: (16-bit, fp32 as torch computes it by default)
PEAK_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "Ascend910B": (353.9, 88.5),
}


@dataclass(frozen=True)
class Flops:
    """Operations of one sample: what the mathematics needs (MFU), and with recomputed blocks (HFU)."""

    model: float
    hardware: float


def tokens_of(grid: tuple[int, ...], config: VaceConfig) -> int:
    """Tokens of a latent grid (R+F, h, w)."""
    patch_t, patch_h, patch_w = config.trunk.patch_size
    frames, height, width = grid
    return (frames // patch_t) * (height // patch_h) * (width // patch_w)


def block_forward(config: VaceConfig, tokens: int) -> tuple[float, float, float]:
    """One block's forward: (products with weights on tokens, products with weights on text, attention itself)."""
    d, ffn, text = config.trunk.hidden_size, config.trunk.ffn_dim, config.trunk.text_len
    on_tokens = 2.0 * tokens * d * (6 * d + 2 * ffn)  # self q k v o, cross q o, two ffn layers
    on_text = 2.0 * text * d * 2 * d  # cross k v
    attention = 4.0 * tokens * tokens * d + 4.0 * tokens * text * d
    return on_tokens, on_text, attention


def step_flops(config: VaceConfig, tokens: int, trainable: Trainable, recomputed: float = 0.0) -> Flops:
    """Forward and backward of one sample with `tokens` tokens; `recomputed` is the share of blocks that run forward twice.

    A trained product costs twice its forward again (gradient of input and of weight), a frozen one that gradients pass
    through once; attention costs twice. What no gradient reaches costs nothing: with `branch`, trunk block 0 and all
    embeddings of the trunk.
    """
    trunk, blocks, branch = config.trunk, config.trunk.num_layers, len(config.vace_layers)
    on_tokens, on_text, attention = block_forward(config, tokens)
    block = on_tokens + on_text + attention
    d, patch = trunk.hidden_size, trunk.patch_size[0] * trunk.patch_size[1] * trunk.patch_size[2]
    edges = 2.0 * tokens * d * patch * (trunk.in_dim + trunk.out_dim)  # patch embedding and head
    edges += 2.0 * trunk.text_len * d * (trunk.text_dim + d)
    joins = 2.0 * tokens * d * (d * (branch + (branch > 0)) + patch * config.vace_in_dim * (branch > 0))
    forward = (blocks + branch) * block + edges + joins
    trained = 2 * (on_tokens + on_text + attention)
    passed = on_tokens + 2 * attention
    if trainable == "all":
        backward = (blocks + branch) * trained + 2 * edges + 2 * joins
    elif trainable == "trunk":
        backward = blocks * trained + 2 * edges + branch * passed + joins
    else:
        backward = branch * trained + (blocks - 1) * passed + 2 * joins + edges / 2
    again = recomputed * (blocks + branch) * block
    return Flops(model=forward + backward, hardware=forward + backward + again)


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The device's peak for matrix products in `dtype` (bf16 or fp32); None for a device that is not in the table."""
    for name, (half, single) in PEAK_TFLOPS.items():
        if name.lower() in device_name.lower():
            return single if dtype == "fp32" else half
    return None
