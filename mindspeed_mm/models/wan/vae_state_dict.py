"""Weight names and sizes of the Wan VAE, in the official .pth and in diffusers' AutoencoderKLWan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.keymap import KeyMap, Rename

_RESNET = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.{p}", "conv1.{p}"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.{p}", "conv2.{p}"),
    ("shortcut.{p}", "conv_shortcut.{p}"),
)
_RESAMPLE = ("resample.1.{p}", "time_conv.{p}")
# settings that do not follow from shapes; all published VAEs of Wan2.1 share them
ARITHMETIC: Mapping[str, Any] = {
    "attn_scales": [],
    "decoder_base_dim": None,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
_SAME_IN_BOTH = ("norm.gamma", "to_qkv.{p}", "proj.{p}")


def vae_key_map(levels: int, res_blocks: int) -> KeyMap:
    """Map official names (ours) to diffusers names (theirs), for `levels` of `res_blocks` blocks each."""
    return KeyMap("diffusers", [*_ends(), *_encoder(), *_decoder(levels, res_blocks)])


def vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Infer the sizes of AutoencoderKLWan from the shapes in an official file.

    The weights themselves determine the number of levels and blocks; a number in an untrusted config cannot
    make the model larger.

    Raises WeightsError if the weights are not those of a Wan VAE.
    """
    try:
        base, z_dim = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        widths: list[int] = [base]
        temporal: list[bool] = []
        blocks = 0
        for i in range(_count(shapes)):
            stem = f"encoder.downsamples.{i}"
            if f"{stem}.resample.1.weight" in shapes:
                temporal.append(f"{stem}.time_conv.weight" in shapes)
                widths.append(base)
            else:
                widths[-1] = shapes[f"{stem}.residual.6.weight"][0]
                blocks += 1
    except (KeyError, IndexError) as error:
        raise WeightsError(
            f"not a Wan VAE: {error} is missing", fix="use the official Wan2.1_VAE.pth or a diffusers folder"
        ) from None
    return {
        "base_dim": base,
        "z_dim": z_dim,
        "dim_mult": [width // max(base, 1) for width in widths],
        "num_res_blocks": blocks // len(widths),
        "temperal_downsample": temporal,  # diffusers' spelling
    }


def encoder_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Translate the shapes that `vae_config` reads from diffusers names to official names.

    These names do not depend on the number of levels.
    """
    return {_FLAT.to_ours(name): shape for name, shape in shapes.items() if _FLAT.knows(name)}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    stem = "encoder.downsamples."
    return len({name.removeprefix(stem).split(".")[0] for name in shapes if name.startswith(stem)})


def _ends() -> Iterator[Rename]:
    yield Rename("conv1.{p}", "quant_conv.{p}")
    yield Rename("conv2.{p}", "post_quant_conv.{p}")
    for part in ("encoder", "decoder"):
        yield Rename(f"{part}.conv1.{{p}}", f"{part}.conv_in.{{p}}")
        yield Rename(f"{part}.head.0.gamma", f"{part}.norm_out.gamma")
        yield Rename(f"{part}.head.2.{{p}}", f"{part}.conv_out.{{p}}")
        yield from _resnet(f"{part}.middle.0", f"{part}.mid_block.resnets.0")
        yield from _resnet(f"{part}.middle.2", f"{part}.mid_block.resnets.1")
        for name in _SAME_IN_BOTH:
            yield Rename(f"{part}.middle.1.{name}", f"{part}.mid_block.attentions.0.{name}")


def _encoder() -> Iterator[Rename]:
    yield from _resnet("encoder.downsamples.{i}", "encoder.down_blocks.{i}")
    for name in _RESAMPLE:
        yield Rename(f"encoder.downsamples.{{i}}.{name}", f"encoder.down_blocks.{{i}}.{name}")


def _decoder(levels: int, res_blocks: int) -> Iterator[Rename]:
    """Rename the decoder: the official file numbers all blocks; diffusers groups them by resolution."""
    group = res_blocks + 2  # one more block than in the encoder, and the upsampler
    for level in range(levels):
        for block in range(res_blocks + 1):
            yield from _resnet(
                f"decoder.upsamples.{level * group + block}", f"decoder.up_blocks.{level}.resnets.{block}"
            )
        for name in _RESAMPLE:
            last = level * group + res_blocks + 1
            yield Rename(f"decoder.upsamples.{last}.{name}", f"decoder.up_blocks.{level}.upsamplers.0.{name}")


def _resnet(ours: str, theirs: str) -> Iterator[Rename]:
    for one, other in _RESNET:
        yield Rename(f"{ours}.{one}", f"{theirs}.{other}")


_FLAT = KeyMap("diffusers", [*_ends(), *_encoder()])
