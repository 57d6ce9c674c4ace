"""Recognize weights of other models by names and shapes, so that errors can say what a file contains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_BY_NAME = (  # the first matching pattern wins, so specific patterns come first
    (r"(encoder\.downsamples|decoder\.upsamples)\.\d+\.(down|up)samples\.", "the VAE of Wan2.2-TI2V-5B"),
    (r"(encoder\.downsamples|decoder\.upsamples|encoder\.down_blocks|decoder\.up_blocks)\.", "a VAE"),
    (
        r"pos_embedding\.embedding\.weight|relative_attention_bias|token_embedding\.weight|^shared\.weight",
        "a T5 text encoder",
    ),
    (r"^(visual|textual|vision_model|text_model)\.", "a CLIP model"),
    (r"audio_injector|audio_proj|casual_audio_encoder", "a speech-to-video (S2V) model"),
    (r"face_adapter|motion_encoder|pose_patch_embedding", "Wan2.2-Animate"),
    (r"control_adapter\.", "a camera-control model of VideoX-Fun"),
    (r"img_emb\.|\.(add_)?k_img\b|\.add_k_proj|image_embedder\.", "an image-to-video (I2V) model"),
    (r"ref_conv\.", "a Fun-Control model of VideoX-Fun"),
    (r"\.scale_weight$|^scaled_fp8$|\.weight_scale$", "a model with fp8 scales (ComfyUI)"),
    (r"^(double_blocks|single_blocks|joint_blocks)\.", "a transformer like HunyuanVideo or FLUX"),
    (r"^transformer_blocks\.", "a diffusers transformer of another model (CogVideoX, LTX, FLUX, …)"),
    (r"^(input_blocks|down_blocks|mid_block|conv_in)\b", "a U-Net of Stable Diffusion"),
)
_BY_CHANNELS = {  # (in_dim, out_dim) of a trunk
    (36, 16): "an image-to-video (I2V) or inpainting trunk",
    (48, 16): "a Fun-Control trunk of VideoX-Fun",
    (52, 16): "a Fun-Control trunk of VideoX-Fun",
    (48, 48): "the trunk of Wan2.2-TI2V-5B, which uses the VAE of Wan2.2",
}


def foreign_model(names: Iterable[str]) -> str | None:
    """Name the model that weights belong to, such as `an image-to-video (I2V) model`; None if unknown."""
    found = list(names)
    return next((what for pattern, what in _BY_NAME if any(re.search(pattern, name) for name in found)), None)


def foreign_trunk(in_dim: int, out_dim: int) -> str | None:
    """Name a trunk that VACE cannot use, by its numbers of channels; None for any other trunk."""
    return _BY_CHANNELS.get((in_dim, out_dim))


def is_wan22_vae(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether weights are those of Wan2.2's VAE, whose first convolution takes 12 channels."""
    first = next(
        (shapes[name] for name in ("encoder.conv1.weight", "encoder.conv_in.weight") if name in shapes), ()
    )
    return len(first) == 5 and first[1] == 12
