"""Floating-point operations of a training step.

For the formulas, see Throughput in docs/guide/pretrain.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mindspeed_mm.models.wan.config import PredictorConfig, VaceConfig

Trainable = Literal["branch", "trunk", "all"]

# dense matmul peak in TFLOP/s from the vendors' data sheets: (16-bit, fp32 with torch's default settings)
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
    """Operations for one sample: without recomputation (for MFU) and with it (for HFU)."""

    model: float
    hardware: float


def tokens_of(grid: tuple[int, ...], config: VaceConfig) -> int:
    """Return the number of tokens of a latent grid (R+F, h, w)."""
    patch_t, patch_h, patch_w = config.trunk.patch_size
    frames, height, width = grid
    return (frames // patch_t) * (height // patch_h) * (width // patch_w)


def block_forward(config: VaceConfig, tokens: int, text: int | None = None) -> tuple[float, float, float]:
    """Return the forward operations of one block: weight matmuls on tokens, those on text, and attention."""
    d, ffn, rows = config.trunk.hidden_size, config.trunk.ffn_dim, text_rows(config, text)
    on_tokens = 2.0 * tokens * d * (6 * d + 2 * ffn)  # self q k v o, cross q o, two ffn layers
    on_text = 2.0 * rows * d * 2 * d  # cross k v
    attention = 4.0 * tokens * (tokens + rows) * d
    return on_tokens, on_text, attention


def text_rows(config: VaceConfig, text: int | None) -> int:
    """Return the number of prompt rows computed: its own, plus one for all padding rows, which are equal."""
    return config.trunk.text_len if text is None else min(text + 1, config.trunk.text_len)


def step_flops(
    config: VaceConfig,
    tokens: int,
    trainable: Trainable,
    recomputed: float = 0.0,
    *,
    text: int | None = None,
    lora: Mapping[str, int] | None = None,
) -> Flops:
    """Forward and backward of one sample with `tokens` tokens and `text` prompt rows (None: the maximum).

    `recomputed` is the fraction of blocks that run forward twice. Backward costs, in units of the forward: a
    trained matmul 2 (gradients of input and weight); a frozen matmul that gradients pass through 1; an
    embedding of inputs 1 (weight gradient only); attention 2; cross-attention to frozen text 1. Where no
    gradient flows, the backward costs nothing: with `branch`, trunk block 0 and all trunk embeddings. `lora`
    maps layers to their number of LoRA parameters; everything else is then frozen and `trainable` is unused.
    """
    trunk, blocks, branch, rows = (
        config.trunk,
        config.trunk.num_layers,
        len(config.vace_layers),
        text_rows(config, text),
    )
    on_tokens, on_text, attention = block_forward(config, tokens, text)
    d, patch = trunk.hidden_size, trunk.patch_size[0] * trunk.patch_size[1] * trunk.patch_size[2]
    trunk_in = 2.0 * tokens * d * patch * trunk.in_dim + 2.0 * rows * d * trunk.text_dim
    text_out, head = 2.0 * rows * d * d, 2.0 * tokens * d * patch * trunk.out_dim
    branch_in = 2.0 * tokens * d * patch * config.vace_in_dim * (branch > 0)
    joins = (
        2.0 * tokens * d * d * (branch + (branch > 0))
    )  # after_proj of each branch block; before_proj of the first
    block = on_tokens + on_text + attention
    forward = (blocks + branch) * block + trunk_in + text_out + head + branch_in + joins
    if lora:
        adapters = sum(
            2.0 * count * (rows if name.endswith(("cross_attn.k", "cross_attn.v")) else tokens)
            for name, count in lora.items()
        )
        forward += adapters
        passed, cross = on_tokens + 2 * attention, 4.0 * tokens * rows * d
        on_trunk = any(name.startswith("blocks.") for name in lora)
        on_branch = any(name.startswith("vace_") for name in lora)
        # trunk blocks without LoRA carry gradients from the first hint on, but none to their text
        backward = head + (blocks * passed if on_trunk else (blocks - 1) * (passed - cross))
        backward += (branch * passed + joins) * on_branch + 2 * adapters
    elif trainable == "all":
        backward = 2 * (blocks + branch) * block + trunk_in + 2 * (text_out + head) + branch_in + 2 * joins
    elif trainable == "trunk":
        passed = on_tokens + on_text + 2 * attention
        backward = 2 * blocks * block + branch * passed + trunk_in + 2 * (text_out + head) + joins
    else:
        cross = 4.0 * tokens * rows * d
        backward = branch * (2 * on_tokens + on_text + 2 * attention)
        backward += (blocks - 1) * (on_tokens + 2 * attention - cross) + head + branch_in + 2 * joins
    return Flops(
        model=forward + backward, hardware=forward + backward + recomputed * (blocks + branch) * block
    )


def recomputed_share(
    config: VaceConfig, plan: Mapping[str, str], trainable: Trainable, tokens: int, text: int | None = None
) -> float:
    """Return the fraction of all blocks' forward operations that run twice under `plan` (module name → mode).

    `selective` keeps the outputs of attention. A trunk block that no gradient reaches (block 0 when the
    branch trains) is not recomputed. Modules inside blocks count with their own operations.
    """
    on_tokens, on_text, attention = block_forward(config, tokens, text)
    whole = on_tokens + on_text + attention
    d, rows = config.trunk.hidden_size, text_rows(config, text)
    kernel = {"self_attn": 4.0 * tokens * tokens * d, "cross_attn": 4.0 * tokens * rows * d}
    parts = {
        "": (whole, attention),
        "self_attn": (8.0 * tokens * d * d + kernel["self_attn"], kernel["self_attn"]),
        "cross_attn": (4.0 * tokens * d * d + on_text + kernel["cross_attn"], kernel["cross_attn"]),
        "ffn": (4.0 * tokens * d * config.trunk.ffn_dim, 0.0),
    }
    twice = 0.0
    for name, mode in plan.items():
        blocks, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        unreached = blocks == "blocks" and number == "0" and trainable == "branch"
        inside_another = bool(part) and f"{blocks}.{number}" in plan
        if blocks in ("blocks", "vace_blocks") and not unreached and not inside_another:
            all_of_it, kept = parts.get(part, (0.0, 0.0))
            twice += all_of_it - (kept if mode == "selective" else 0.0)
    return twice / (whole * (config.trunk.num_layers + len(config.vace_layers)))


def vace_cost(
    predictor: PredictorConfig, plan: Mapping[str, str], lora: Mapping[str, int] | None = None
) -> Callable[[tuple[int, ...]], tuple[int, Flops]]:
    """Return a function from (R+F, h, w, text rows) to the tokens and operations of one VACE sample.

    `plan` is the recompute plan; `lora` maps layers to their number of LoRA parameters.
    """
    sizes, trainable = predictor.model, predictor.trainable
    if lora:  # blocks that no gradient reaches are not recomputed
        parts = {name.split(".")[0] for name in lora}
        trainable = "all" if "blocks" in parts else "branch"
        plan = {
            name: mode for name, mode in plan.items() if parts != {"blocks"} or name.startswith("blocks.")
        }

    @lru_cache
    def cost(size: tuple[int, ...]) -> tuple[int, Flops]:
        *grid, text = size
        tokens = tokens_of(tuple(grid), sizes)
        share = recomputed_share(sizes, plan, trainable, tokens, text)
        return tokens, step_flops(sizes, tokens, trainable, share, text=text, lora=lora)

    return cost


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Return the device's matmul peak in TFLOP/s for `dtype` (bf16 or fp32); None for an unknown device."""
    for name, (half, single) in PEAK_TFLOPS.items():
        if name.lower() in device_name.lower():
            return single if dtype == "fp32" else half
    return None
