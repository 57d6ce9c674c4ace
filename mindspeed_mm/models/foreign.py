"""Foreign models by weight names and shapes, so that an error says what a file is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_BY_NAME = (  # the first pattern that a name matches decides; the more special ones come first
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
    (r"^(double_blocks|single_blocks|joint_blocks)\.", "a transformer of the HunyuanVideo or FLUX kind"),
    (r"^transformer_blocks\.", "a diffusers transformer of another model (CogVideoX, LTX, FLUX, …)"),
    (r"^(input_blocks|down_blocks|mid_block|conv_in)\b", "a U-Net of Stable Diffusion"),
)
_BY_CHANNELS = {  # (in_dim, out_dim) of a trunk
    (36, 16): "an image-to-video (I2V) or inpainting trunk",
    (48, 16): "a Fun-Control trunk of VideoX-Fun",
    (52, 16): "a Fun-Control trunk of VideoX-Fun",
    (48, 48): "the trunk of Wan2.2-TI2V-5B, made for the VAE of Wan2.2",
}


def foreign_model(names: Iterable[str]) -> str | None:
    """What model these weight names belong to, where that is known: `an image-to-video (I2V) model`."""
    found = list(names)
    return next((what for pattern, what in _BY_NAME if any(re.search(pattern, name) for name in found)), None)


def foreign_trunk(in_dim: int, out_dim: int) -> str | None:
    """What a trunk with these channels is for, where it is known that VACE cannot use it."""
    return _BY_CHANNELS.get((in_dim, out_dim))


def is_wan22_vae(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are weights of Wan2.2's VAE: 48 latent channels, and frames come in as 12 channels."""
    first = next(
        (shapes[name] for name in ("encoder.conv1.weight", "encoder.conv_in.weight") if name in shapes), ()
    )
    return len(first) == 5 and first[1] == 12
