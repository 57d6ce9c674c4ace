"""The registry of mm-convert's converters.

Other packages can add converters through the entry-point group `mindspeed_mm.converters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint import vace
from mindspeed_mm.registry import Registry


@dataclass(frozen=True)
class Converter:
    """The methods of one model family.

    Each method takes one config named `cfg`, whose fields become `--cfg.…` flags. A method should import
    torch in its body, so that --help stays fast.
    """

    methods: Mapping[str, Callable[[Any], None]]


CONVERTERS: Registry[Converter] = Registry("converter", "mindspeed_mm.converters")
CONVERTERS.add(
    "VACEConverter",
    Converter(
        methods={
            "hf_to_mm": vace.hf_to_mm,
            "mm_to_hf": vace.mm_to_hf,
            "hf_diffusers_to_mm": vace.hf_diffusers_to_mm,
            "mm_to_hf_diffusers": vace.mm_to_hf_diffusers,
            "resplit": vace.resplit,
            "dcp_to_torch": vace.dcp_to_torch,
            "assemble_pipeline": vace.assemble_pipeline,
            "merge_lora": vace.merge_lora,
            "lora_to_peft": vace.lora_to_peft,
            "lora_to_comfyui": vace.lora_to_comfyui,
            "lora_to_diffusers": vace.lora_to_diffusers,
            "lora_to_hf": vace.lora_to_hf,
            "lora_to_comfy": vace.lora_to_comfyui,
            "extract_lora": vace.extract_lora,
        }
    ),
)
