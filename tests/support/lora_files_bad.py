"""Files that are no LoRA of the tiny transformer: what they hold, and the facts that the refusal names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.support.tiny import tiny_transformer

SHAPES = {name: tuple(w.shape) for name, w in tiny_transformer().state_dict().items()}
Q = "blocks.0.self_attn.q"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345678\n"


def pair(out: int | None = None, width: int | None = None, rank: int = 2) -> tuple[Tensor, Tensor]:
    full = SHAPES[f"{Q}.weight"]
    return torch.ones(rank, width or full[1]), torch.ones(out or full[0], rank)


REFUSED: Mapping[str, tuple[dict[str, Tensor], Sequence[object]]] = {
    "up-missing": ({f"{Q}.lora_A.weight": pair()[0]}, [f"{Q}.lora_A.weight", "lora_B"]),
    "down-missing": ({f"{Q}.lora_up.weight": pair()[1]}, [f"{Q}.lora_up.weight", "lora_down"]),
    "alpha-alone": ({f"{Q}.alpha": torch.tensor(1.0)}, [f"{Q}.alpha"]),
    "ranks": ({f"{Q}.lora_A.weight": pair()[0], f"{Q}.lora_B.weight": pair(rank=3)[1]}, ["ranks", 2, 3]),
    "width": (
        {f"{Q}.lora_A.weight": pair(width=1536)[0], f"{Q}.lora_B.weight": pair(out=1536)[1]},
        [f"{Q}.weight", 1536, "1.3B"],
    ),
    "alpha-0": (
        {
            f"{Q}.lora_A.weight": pair()[0],
            f"{Q}.lora_B.weight": pair()[1],
            f"{Q}.alpha": torch.tensor(0.0),
        },
        [f"{Q}.alpha", 0],
    ),
    "alpha-bool": (
        {
            f"{Q}.lora_A.weight": pair()[0],
            f"{Q}.lora_B.weight": pair()[1],
            f"{Q}.alpha": torch.tensor(True),
        },
        [f"{Q}.alpha", "bool"],
    ),
    "rank-0": (
        {f"{Q}.lora_A.weight": pair(rank=0)[0], f"{Q}.lora_B.weight": pair(rank=0)[1]},
        [f"{Q}.lora_A.weight", "rank 0"],
    ),
    "twice": (
        {
            f"{Q}.lora_A.weight": pair()[0],
            f"{Q}.lora_B.weight": pair()[1],
            f"model.{Q}.lora_A.weight": pair()[0],
        },
        ["twice", f"model.{Q}.lora_A.weight"],
    ),
    "dora": ({f"{Q}.dora_scale": torch.ones(1)}, ["DoRA"]),
    "peft-dora": ({f"{Q}.lora_magnitude_vector.weight": torch.ones(1)}, ["DoRA"]),
    "loha": ({f"{Q}.hada_w1_a": torch.ones(1)}, ["LoHa"]),
    "lokr": ({f"{Q}.lokr_w1": torch.ones(1)}, ["LoKr"]),
    "oft": ({f"{Q}.oft_blocks": torch.ones(1)}, ["OFT"]),
    "boft": ({f"{Q}.boft_R": torch.ones(1)}, ["BOFT"]),
    "glora": ({f"{Q}.a1.weight": torch.ones(1)}, ["GLoRA"]),
    "set-weight": ({f"{Q}.set_weight": torch.ones(1)}, ["set_weight"]),
    "flux": ({"transformer.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 2)}, ["Flux"]),
    "flux-diffusers": ({(
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"
    ): torch.ones(2, 2)}, ["Flux"]),
    "sdxl": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.ones(2, 2)}, ["Stable Diffusion"]),
    "text-encoder": ({"lora_te1_text_model_x.lora_down.weight": torch.ones(2, 2)}, ["text encoder"]),
    "i2v": ({"diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(2, 2)}, ["I2V"]),
    "more-blocks": ({"blocks.29.ffn.0.lora_A.weight": torch.ones(2, 2)}, ["blocks", 30]),
    "whole-model": ({f"{Q}.weight": torch.ones(2, 2)}, ["no LoRA"]),
    "nothing-known": ({"hello.lora_A.weight": torch.ones(2, 2)}, ["hello.lora_A.weight", "1 of its 1"]),
    "integers": (
        {f"{Q}.lora_A.weight": pair()[0].to(torch.int8), f"{Q}.lora_B.weight": pair()[1]},
        ["int8"],
    ),
}  # fmt: skip
