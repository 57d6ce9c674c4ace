"""Parses the keys of LoRA files.

The lookup table is built from the base model's own weight names, so no key is ever split at underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.keymap import KeyMap
from mindspeed_mm.models.wan.state_dict import KEY_MAPS

Kind = Literal["down", "up", "alpha", "diff", "diff_b", "diff_m", "whole"]
_SUFFIX_OF: Mapping[Kind, str] = {
    "down": r"\.lora_A(\.[\w-]+)?\.weight|\.lora_A|[._]lora_down\.weight|[._]lora\.down\.weight|"
    r"\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_B(\.[\w-]+)?\.weight|\.lora_B|[._]lora_up\.weight|[._]lora\.up\.weight|"
    r"\.lora_linear_layer\.up\.weight",
    "alpha": r"\.alpha",
    "diff_m": r"(\.modulation)?\.diff_m",
    "diff_b": r"\.diff_b",
    "diff": r"\.diff",
}
_SUFFIXES = tuple((re.compile(f"(?:{pattern})$"), kind) for kind, pattern in _SUFFIX_OF.items())
_PREFIXES = (
    "base_model.model.", "model.", "diffusion_model.", "transformer.", "transformer_2.", "unet.", "module.",
    "predictor.", "pipe.", "dit.", "dit2.", "vace.", "vace2.",
    "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip
_OF_THE_SECOND = ("transformer_2.", "dit2.", "vace2.")  # A14B's low-noise expert
_UNSUPPORTED = (
    (r"dora_scale|lora_magnitude_vector", "DoRA"),
    (r"hada_[wt]\d|hada_t", "LoHa"),
    (r"lokr_[wt]\d", "LoKr"),
    (r"boft_|\.boft", "BOFT"),
    (r"oft_(blocks|diag|[RS])|\.oft\b", "OFT"),
    (r"\.(a1|a2|b1|b2)\.weight$", "GLoRA"),
    (r"\.(ia3_l|on_input)", "IA3"),
    (r"lora_mid\.weight$", "LoCon with a middle tensor (CP decomposition)"),
    (r"\.set_weight$", "set_weight"),
    (r"\.reshape_weight$", "reshape_weight"),
    (r"\.(w_norm|b_norm)$", "norm weights of LyCORIS"),
    (r"lora_[AB](\.[\w-]+)?\.bias$|lora_(up|down)\.bias$", "LoRA with a bias"),
    (r"lora_embedding_[AB]", "LoRA of an embedding"),
)  # fmt: skip
_FAMILIES = (
    (r"single_transformer_blocks|single_blocks|double_blocks", "a Flux or HunyuanVideo LoRA"),
    (r"(lora_unet_|unet\.|^)(down|up|mid|input|output|middle)_?blocks?[._]", "a Stable Diffusion LoRA"),
    (r"joint_blocks", "a Stable Diffusion 3 LoRA"),
    (r"transformer_blocks[._]\d+[._](img_mlp|txt_mlp|attn[._]add_)", "a Qwen-Image LoRA"),
    (r"transformer_blocks[._]\d+", "a LoRA of LTX-Video, CogVideoX or another diffusers transformer"),
    (r"(audio_injector|audio_proj|casual_audio)", "a LoRA of Wan's speech-to-video model (S2V)"),
    (r"(face_adapter|motion_encoder|face_encoder)", "a LoRA of Wan2.2-Animate"),
    (r"(img_emb|k_img|v_img|add_k_proj|add_v_proj)", "a LoRA of Wan's image-to-video model (I2V)"),
    (r"^(lora_te\d?_|text_encoder|te\.|cond_stage_model)", "a LoRA of a text encoder"),
    (
        r"(^|\.)layers[._]\d+[._](attention|self_attn|mlp|feed_forward)",
        "a LoRA of a language model or Lumina",
    ),
)  # fmt: skip
_FLUX = re.compile(r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.\d)|single_blocks\.\d+\.linear[12]")


@dataclass(frozen=True)
class Key:
    """One parsed key."""

    weight: str  # official name of the weight that the LoRA changes
    kind: Kind
    is_second: bool  # the key belongs to the low-noise expert
    prefix: str  # everything before the module name


class NameTable:
    """Every spelling, in every dialect, of one model's modules."""

    def __init__(self, weights: Iterable[str], key_maps: Mapping[str, KeyMap] = KEY_MAPS) -> None:
        self.weights = frozenset(weights)
        self._modules: dict[str, str] = {}
        self.spellings: dict[str, str] = {}  # spelling of a module → its dialect
        for weight in sorted(self.weights):
            module, _, last = weight.rpartition(".")
            for dialect, key_map in key_maps.items():
                stem = key_map.to_theirs(weight).rpartition(".")[0]
                for spelling in (stem, stem.replace(".", "_")):
                    self._modules.setdefault(spelling, module)
                    self.spellings.setdefault(spelling, dialect)
            if last == "modulation":
                self._modules.setdefault(weight, weight)

    def find(self, key: str, *, with_whole: bool = False) -> Key | None:
        """Parse a key, or return None if it does not belong to a LoRA for this model.

        With `with_whole`, a plain weight name is also valid, and its tensor replaces the model's weight.
        """
        for pattern, kind in _SUFFIXES:
            if (match := pattern.search(key)) is None:
                continue
            stem, prefix = key[: match.start()], ""
            module, prefix = self._module(stem)
            if module is None:
                continue
            weight = self._weight(module, kind)
            return Key(weight, kind, _is_second(prefix), prefix) if weight in self.weights else None
        if with_whole:
            stem, _, last = key.rpartition(".")
            module, prefix = self._module(stem)
            if module is not None and f"{module}.{last}" in self.weights:
                return Key(f"{module}.{last}", "whole", _is_second(prefix), prefix)
        return None

    def _module(self, stem: str) -> tuple[str | None, str]:
        prefix = ""
        while True:
            if stem in self._modules:
                return self._modules[stem], prefix
            found = next((one for one in _PREFIXES if stem.startswith(one)), None)
            if found is None:
                return None, prefix
            stem, prefix = stem[len(found) :], prefix + found

    def _weight(self, module: str, kind: Kind) -> str:
        if module in self.weights:  # a parameter that is not in a leaf module
            return module
        last = {"diff_b": "bias", "diff_m": "modulation"}.get(kind, "weight")
        return f"{module}.{last}"


def refuse_unsupported(keys: Iterable[str], where: object) -> None:
    """Raise WeightsError for variants other than plain LoRA, such as DoRA or LoHa."""
    known = list(keys)
    for pattern, form in _UNSUPPORTED:
        if found := [key for key in known if re.search(pattern, key)]:
            raise WeightsError(
                f"is of the form {form} ({found[0]}), which is not supported",
                where=str(where),
                fix="use a plain LoRA, or merge this one with the tool that made it",
            )


def family_of(keys: Iterable[str]) -> str | None:
    """Guess from unrecognized keys which other model a LoRA is for, for example `a Flux LoRA`."""
    known = list(keys)
    if any(_FLUX.search(key) for key in known):
        return "a Flux LoRA"
    return next((what for pattern, what in _FAMILIES if any(re.search(pattern, key) for key in known)), None)


def is_lora_key(key: str) -> bool:
    """Return whether `key` looks like a key from a LoRA file for any model."""
    return any(pattern.search(key) for pattern, _ in _SUFFIXES)


def _is_second(prefix: str) -> bool:
    return any(one in prefix for one in _OF_THE_SECOND)
