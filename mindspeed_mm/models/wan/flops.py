"""How many floating-point operations a training step needs.

Formulas: docs/guide/pretrain.md, chapter Throughput.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mindspeed_mm.models.wan.config import PredictorConfig, VaceConfig

Trainable = Literal["branch", "trunk", "all"]

# dense peak of matrix products, TFLOP/s, from the makers' data sheets: (16-bit, fp32 as torch computes it by
# default)
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


def block_forward(config: VaceConfig, tokens: int, text: int | None = None) -> tuple[float, float, float]:
    """One block's forward.

    (products with weights on tokens, products with weights on text, attention itself).
    """
    d, ffn, rows = config.trunk.hidden_size, config.trunk.ffn_dim, text_rows(config, text)
    on_tokens = 2.0 * tokens * d * (6 * d + 2 * ffn)  # self q k v o, cross q o, two ffn layers
    on_text = 2.0 * rows * d * 2 * d  # cross k v
    attention = 4.0 * tokens * (tokens + rows) * d
    return on_tokens, on_text, attention


def text_rows(config: VaceConfig, text: int | None) -> int:
    """Rows of a prompt that are computed.

    Its own, and one for all padding rows together, since those are equal.
    """
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
    """Forward and backward of one sample of `tokens` tokens and `text` prompt rows (None: the maximum).

    `recomputed` is the share of blocks that run forward twice. A trained product costs twice its forward
    again (gradient of input and of weight), a frozen one that gradients pass through once, an embedding of
    inputs its weight's gradient only; attention costs twice, cross attention to a frozen text once. What no
    gradient reaches costs nothing: with `branch`, trunk block 0 and all embeddings of the trunk. `lora` is
    the number of its weights by layer: all else is frozen then, and `trainable` does not matter.
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
    )  # after_proj of each branch block, before_proj of the first
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
        # a trunk block without a LoRA has a gradient from the first hint on, and none in its text
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
    """The share of all blocks' forward operations that run twice under `plan`: module name → its mode.

    `selective` keeps what attention answers. A trunk block that no gradient reaches (block 0 when the branch
    trains) is never run again. Modules inside blocks count by their own operations.
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
    """(R+F, h, w, text rows) → tokens and operations of one sample of VACE.

    Under a recompute plan, with a LoRA of these weights by layer.
    """
    sizes, trainable = predictor.model, predictor.trainable
    if lora:  # what gradients do not reach never runs again
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
    """The device's peak for matrix products in `dtype` (bf16 or fp32).

    None for a device that is not in the table.
    """
    for name, (half, single) in PEAK_TFLOPS.items():
        if name.lower() in device_name.lower():
            return single if dtype == "fp32" else half
    return None
