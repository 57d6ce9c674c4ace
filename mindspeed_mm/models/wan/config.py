"""Sizes of the Wan trunk and the VACE branch, presets, and the `predictor` section of a model JSON.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config
from mindspeed_mm.geometry import WAN


class WanConfig(Config):
    """Sizes of the trunk. Field names are those of the model JSON."""

    hidden_size: int = Field(gt=0, le=65536, description="width of the residual stream, D")
    ffn_dim: int = Field(gt=0, le=1 << 18, description="width of the feed-forward layer")
    num_heads: int = Field(gt=0, le=1024, description="number of attention heads, N")
    num_layers: int = Field(gt=0, le=1000, description="number of trunk blocks")
    in_dim: int = Field(default=16, gt=0, le=4096, description="number of input latent channels")
    out_dim: int = Field(default=16, gt=0, le=4096, description="number of output latent channels")
    text_dim: int = Field(default=4096, gt=0, le=65536, description="width of the text encoder's output")
    text_len: int = Field(default=512, gt=0, le=65536, description="number of text tokens after zero padding")
    freq_dim: int = Field(
        default=256, gt=0, le=65536, description="width of the sinusoidal timestep embedding"
    )
    patch_size: tuple[int, int, int] = Field(
        default=(1, 2, 2), description="latent cells of one token (time, height, width)"
    )
    eps: float = Field(default=1e-6, gt=0, le=1, description="epsilon of all norms")

    @model_validator(mode="after")
    def _heads_divide(self) -> WanConfig:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be an even head width"
            )
        return self

    @property
    def head_dim(self) -> int:
        """K, the channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Channels of a head that encode (time, height, width); they sum to head_dim."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side


class VaceConfig(Config):
    """Sizes of trunk and branch."""

    trunk: WanConfig
    vace_layers: tuple[int, ...] = Field(
        description="trunk block that each branch block feeds; strictly increasing; () = no branch"
    )
    vace_in_dim: int = Field(
        default=WAN.context_channels,
        gt=0,
        le=4096,
        description="channels of vace_context: inactive 16, reactive 16, mask 64",
    )

    @model_validator(mode="after")
    def _layers_fit(self) -> VaceConfig:
        layers = self.vace_layers
        if any(b <= a for a, b in pairwise(layers)) or any(
            not 0 <= i < self.trunk.num_layers for i in layers
        ):
            raise ValueError(
                f"vace_layers {list(layers)} must increase strictly within 0..{self.trunk.num_layers - 1}"
            )
        if layers and layers[0] != 0:
            raise ValueError(
                f"vace_layers must begin with 0, not {layers[0]}: branch block 0 reads the patch embedding"
            )
        return self


WAN_1_3B = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40)
VACE_1_3B = VaceConfig(trunk=WAN_1_3B, vace_layers=tuple(range(0, 30, 2)))
VACE_14B = VaceConfig(trunk=WAN_14B, vace_layers=tuple(range(0, 40, 5)))
PRESETS: Mapping[str, VaceConfig] = {
    "Wan2.1-VACE-1.3B": VACE_1_3B,
    "Wan2.1-VACE-14B": VACE_14B,
    "Wan2.2-VACE-A14B": VACE_14B,  # each of its two experts
}

BRANCH = ("vace_blocks", "vace_patch_embedding")  # first components of the branch's weight names
ADAPTED = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # name suffixes of layers with LoRA or 8 bits by default
FP32_MODULES = (
    "time_embedding",
    "time_projection",
    "head",
)  # stay in fp32 when other weights are bf16

_FIXED = "the value is the same in every VACE model"
_OLD_KEYS: Mapping[str, str] = {  # in published files, for trunk and branch
    "img_dim": "VACE has no image encoder",
    "max_seq_len": "rotary tables are computed for each token grid",
    "attention_async_offload": "use offload_block_inputs of fsdp2_config.yaml",
    "use_fused_rmsnorm": "the device's fused kernels are used if it has them",
}


class VaceDitConfig(Config):
    """`predictor.vace_dit`: the branch.

    Settings shared with the trunk are optional; if given, they must match the trunk's.
    """

    vace_layers: tuple[int, ...] = Field(description="index of the trunk block that each branch block feeds")
    in_dim: int = Field(default=WAN.context_channels, gt=0, description="channels of vace_context")
    init_from_trunk: bool = Field(
        default=False,
        description="initialize the branch from the blocks of the trunk, for weights without VACE keys",
    )
    vace_pretrained: str | None = Field(
        default=None,
        description="folder or file with the branch, instead of the branch in predictor.from_pretrained",
    )
    # repeated from the trunk in published files
    hidden_size: int | None = None
    ffn_dim: int | None = None
    num_heads: int | None = None
    freq_dim: int | None = None
    text_dim: int | None = None
    text_len: int | None = None
    patch_size: tuple[int, int, int] | None = None
    eps: float | None = None
    num_layers: int | None = None
    UNUSED: ClassVar[Mapping[str, str]] = {
        **_OLD_KEYS,
        "pipeline_num_layers": "a branch block is on the same stage as the trunk block that it feeds",
        "model_type": "VACE is built on a text-to-video model",
        "qk_norm": _FIXED,
        "qk_norm_type": _FIXED,
        "cross_attn_norm": _FIXED,
        "out_dim": "the branch has no head",
        "model_id": "use predictor.model_id",
        "dtype": "use predictor.dtype",
    }


class PredictorConfig(WanConfig):
    """`predictor` of the model JSON: the transformer, its weights, and which weights train."""

    model_id: Literal["vace"] = "vace"
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="dtype of matrix products; must equal param_dtype of fsdp2_config.yaml"
    )
    residual_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="dtype of the residual stream"
    )
    from_pretrained: str | None = Field(
        default=None, description="folder or file with weights, in any known dialect"
    )
    trainable: Literal["branch", "trunk", "all"] = Field(
        default="branch", description="part of the model that trains; the rest is frozen"
    )
    vace_dit: VaceDitConfig
    qk_norm: Literal[True] = True
    qk_norm_type: Literal["rmsnorm"] = "rmsnorm"
    cross_attn_norm: Literal[True] = True
    pipeline_num_layers: Any = Field(
        default=None,
        description="number of layers in each pipeline stage; with virtual stages, one such list per chunk",
    )
    UNUSED: ClassVar[Mapping[str, str]] = {
        **_OLD_KEYS,
        "model_type": "VACE is built on a text-to-video model",
        "window_size": _FIXED,
        "hidden_dim": "use hidden_size",
        "attention_type": "the device's fused attention is used",
        "fa_layout": "the device's fused attention is used",
        "clip_dim": "VACE has no image encoder",
        "has_image_input": "VACE has no image encoder",
    }

    @model_validator(mode="after")
    def _branch_agrees(self) -> PredictorConfig:
        for name in (
            "hidden_size",
            "ffn_dim",
            "num_heads",
            "freq_dim",
            "text_dim",
            "text_len",
            "patch_size",
            "eps",
            "num_layers",
        ):
            repeated = getattr(self.vace_dit, name)
            if repeated is not None and repeated != getattr(self, name):
                raise ValueError(
                    f"vace_dit.{name} is {repeated} but predictor.{name} is {getattr(self, name)}; leave it "
                    "out of vace_dit"
                )
        VaceConfig(
            trunk=WanConfig(**self._trunk_fields()), vace_layers=self.vace_dit.vace_layers
        )  # raises if they do not fit
        return self

    @model_validator(mode="after")
    def _weights_agree(self) -> PredictorConfig:
        dit = self.vace_dit
        if not dit.vace_layers and self.trainable == "branch":
            raise ValueError("trainable is branch but vace_dit.vace_layers is empty; set trainable to trunk")
        if dit.vace_pretrained and dit.init_from_trunk:
            raise ValueError(
                "vace_dit.vace_pretrained and vace_dit.init_from_trunk both define the branch; remove one"
            )
        if dit.vace_pretrained and not self.from_pretrained:
            raise ValueError(
                "vace_dit.vace_pretrained contains only the branch; set from_pretrained to the trunk"
            )
        return self

    def _trunk_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in WanConfig.model_fields}

    @property
    def reads_context(self) -> bool:
        """Whether the model takes a vace_context; `vace_layers: []` is a plain text-to-video trunk."""
        return bool(self.vace_dit.vace_layers)

    @property
    def weight_paths(self) -> dict[str, str]:
        """Key in `predictor` → folder or file that it names."""
        named = {
            "from_pretrained": self.from_pretrained,
            "vace_dit.vace_pretrained": self.vace_dit.vace_pretrained,
        }
        return {key: path for key, path in named.items() if path}

    @property
    def model(self) -> VaceConfig:
        """The sizes alone."""
        trunk = WanConfig(**self._trunk_fields())
        return VaceConfig(
            trunk=trunk, vace_layers=self.vace_dit.vace_layers, vace_in_dim=self.vace_dit.in_dim
        )
