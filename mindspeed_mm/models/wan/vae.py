"""The Wan VAE: diffusers' AutoencoderKLWan with latents normalized in fp32, loaded from any known format."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from mindspeed_mm.errors import DataError, WeightsError
from mindspeed_mm.files import regular_file, stat_path
from mindspeed_mm.geometry import WAN
from mindspeed_mm.models.dialects import strip_prefix
from mindspeed_mm.models.foreign import foreign_model, is_wan22_vae
from mindspeed_mm.models.loading import (
    NOT_BUILT,
    assign_weights,
    fingerprint,
    read_json,
    read_tensors,
    refuse_conflicts,
    shard_paths,
)
from mindspeed_mm.models.wan.vae_state_dict import ARITHMETIC, encoder_shapes, vae_config, vae_key_map

_CLASS = "AutoencoderKLWan"  # class name in a config.json of diffusers
_STATISTICS = ("latents_mean", "latents_std")


class WanVae:
    """Converts between pixels in [-1, 1] and normalized latents.

    Latents are always fp32. No method is differentiable.
    """

    def __init__(self, model: AutoencoderKLWan, fingerprint: str) -> None:
        self.model = prefer_onednn(model.eval().requires_grad_(False))
        self.fingerprint = fingerprint
        self.z_dim = int(model.config.z_dim)
        self._mean = torch.tensor(model.config.latents_mean, dtype=torch.float32).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(model.config.latents_std, dtype=torch.float32).view(1, -1, 1, 1, 1)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self._weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation."""
        dtype: torch.dtype = self._weight.dtype
        return dtype

    def to(self, device: torch.device | str) -> WanVae:
        """Move the weights to `device`, and return this object."""
        self.model.to(device)
        return self

    def enable_tiling(
        self, size: tuple[int, int] | None = None, stride: tuple[int, int] | None = None
    ) -> None:
        """Compute in overlapping tiles of `size` pixels (height, width), `stride` pixels apart.

        Tiling needs less memory, and changes the results slightly.

        Raises WeightsError if the installed diffusers cannot tile this VAE.
        """
        if not hasattr(self.model, "use_tiling"):
            raise WeightsError(
                f"the VAE of diffusers {diffusers.__version__} does not support tiling",
                fix=(
                    "install a newer diffusers (constraints.txt names one), use a smaller size, or set tiled "
                    "to never"
                ),
            )
        height, width = size or (None, None)
        stride_height, stride_width = stride or (None, None)
        self.model.enable_tiling(height, width, stride_height, stride_width)

    def disable_tiling(self) -> None:
        """Compute whole frames again."""
        if self.tiled:
            self.model.disable_tiling()

    @property
    def tiled(self) -> bool:
        """Whether tiling is on. The VAE of diffusers 0.33 does not support it."""
        return bool(getattr(self.model, "use_tiling", False))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode video [B, 3, T, H, W] in [-1, 1] as latents [B, 16, F, h, w] fp32, the posterior's mode.

        Frames beyond the last 4k+1 are dropped, as in the official code.

        Raises DataError if the height or width is not a multiple of 8.
        """
        _, rows, columns = WAN.stride
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[3] % rows or video.shape[4] % columns:
            raise DataError(
                f"got {list(video.shape)}",
                where="video",
                expected="[B, 3, T, H, W] with H and W multiples of 8",
            )
        mean: Tensor = self.model.encode(video.to(self.device, self.dtype)).latent_dist.mode().float()
        return (mean - self._mean.to(mean.device)) / self._std.to(mean.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 16, F, h, w] to video [B, 3, 4(F-1)+1, H, W] fp32, clamped to [-1, 1]."""
        sample: Tensor = self.model.decode(self._denormalize(latents), return_dict=False)[0]
        return sample.float()

    @torch.no_grad()
    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents [16, F, h, w], and yield frames as they become available.

        Yields the frames of `decode` as [3, 1, H, W] first, and then as [3, 4, H, W].

        With tiling, the whole clip is decoded before the first frame is yielded, because the caches of all
        tiles (`_feat_map`) would need more memory than the clip.
        """
        if self._tiles(latents):
            yield from _chunks(self.decode(latents[None])[0])
            return
        model = self.model
        cells = model.post_quant_conv(self._denormalize(latents[None]))
        model.clear_cache()
        cache = model._feat_map  # the causal convolutions cache earlier frames in it
        for frame in torch.split(cells, 1, dim=2):
            yield model.decoder(frame, feat_cache=cache, feat_idx=[0]).float().clamp(-1.0, 1.0)[0]
        model.clear_cache()

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = next(self.model.parameters())
        return weight

    def _denormalize(self, latents: Tensor) -> Tensor:
        if latents.ndim != 5 or latents.shape[1] != self.z_dim:
            raise DataError(
                f"got {list(latents.shape)}", where="latents", expected=f"[B, {self.z_dim}, F, h, w]"
            )
        wide = latents.to(self.device, torch.float32)
        return (wide * self._std.to(wide.device) + self._mean.to(wide.device)).to(self.dtype)

    def _tiles(self, latents: Tensor) -> bool:
        if not self.tiled:
            return False
        model = self.model
        small = (model.tile_sample_min_height // WAN.stride[1], model.tile_sample_min_width // WAN.stride[2])
        return bool(latents.shape[-2] > small[0] or latents.shape[-1] > small[1])


class LazyVae:
    """A VAE that is moved to the device when it encodes its first clip.

    If all clips are already encoded, a run needs only the fingerprint of the VAE.
    """

    def __init__(self, vae: WanVae, device: torch.device) -> None:
        self._vae, self._placed = vae, False
        self.device = device

    def encode(self, video: Tensor) -> Tensor:
        """Encode like `WanVae.encode`."""
        if not self._placed:
            self._vae.to(self.device)
            self._placed = True
        return self._vae.encode(video)


def prefer_onednn(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """Run the causal convolutions in oneDNN on a CPU, and return the model, which can no longer be trained.

    torch selects the kernel by batch size, channels, frames and rows. For the short single clips of this VAE,
    it selects a plain loop, which is up to ten times slower if there are few channels. oneDNN computes the
    same sums in another order.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module._conv_forward = partial(_convolution, module)  # type: ignore[method-assign]
    return model


def _convolution(conv: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Replace `nn.Conv3d._conv_forward`, using oneDNN on a CPU that supports it."""
    out: Tensor
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch._C._has_mkldnn:
        settings = conv.padding, conv.stride, conv.dilation, conv.groups
        out = torch.ops.aten.mkldnn_convolution(x, weight, bias, *settings)
    else:
        out = nn.Conv3d._conv_forward(conv, x, weight, bias)
    return out


def load_vae(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tiling: bool = False,
) -> WanVae:
    """Load the VAE at `path`: the official .pth, a safetensors file, a `vae` folder, or a model folder.

    A fine-tuned VAE can set its `latents_mean` and `latents_std` in the config.json of its folder, or in a
    .json file with the name of its .pth file. Raises WeightsError if there is no VAE at `path`, or if it is
    damaged or belongs to another model.
    """
    files, settings, beside = _locate(Path(path))
    state = strip_prefix(read_tensors(files), ("encoder.conv1.weight", "encoder.conv_in.weight"), path)
    if is_wan22_vae({name: tuple(weight.shape) for name, weight in state.items()}):
        raise WeightsError(
            "got the VAE of Wan2.2-TI2V-5B (48 latent channels)",
            where=path,
            expected="the VAE of Wan2.1 (16 latent channels)",
            fix="use Wan2.1_VAE.pth for all VACE models, including A14B",
        )
    if "encoder.conv1.weight" in state:
        sizes = vae_config({name: tuple(weight.shape) for name, weight in state.items()})
        names = vae_key_map(len(sizes["dim_mult"]), sizes["num_res_blocks"])
        state = {names.to_theirs(name): weight for name, weight in state.items()}
    elif "encoder.conv_in.weight" in state:
        sizes = vae_config(encoder_shapes({name: tuple(weight.shape) for name, weight in state.items()}))
    else:
        got = foreign_model(state) or f"unknown weights ({', '.join(sorted(state)[:3])}, …)"
        raise WeightsError(
            f"got {got}", where=path, expected="a Wan VAE", fix="use Wan2.1_VAE.pth or a vae folder"
        )
    refuse_conflicts(settings, sizes, beside, files[0], {**ARITHMETIC, "decoder_base_dim": sizes["base_dim"]})
    settings = {**sizes, **{name: settings[name] for name in _STATISTICS if name in settings}}
    _check_statistics(settings, beside)
    model = _build(settings, files[0])
    assign_weights(model, state, Path(path), dtype)
    statistics = [list(model.config.latents_mean), list(model.config.latents_std)]
    vae = WanVae(model.to(device), fingerprint(state, statistics))
    if tiling:
        vae.enable_tiling()
    return vae


def _locate(path: Path) -> tuple[list[Path], dict[str, Any], Path]:
    """Return the weight files, the settings in the JSON next to them, and the path of that JSON."""
    if not stat.S_ISDIR(stat_path(path, WeightsError).st_mode):
        regular_file(path, WeightsError)
        own, shared = path.with_suffix(".json"), path.parent / "config.json"
        if os.path.lexists(own):
            return [path], read_json(own), own
        if path.suffix == ".safetensors" and os.path.lexists(shared):
            settings = read_json(shared)
            if not _is_of_another_model(settings):
                return [path], settings, shared
        return [path], {}, path
    for folder in (path, path / "vae"):
        config = folder / "config.json"
        if os.path.lexists(config) and read_json(config).get("_class_name") == _CLASS:
            if files := shard_paths(folder):
                return files, read_json(config), config
            raise WeightsError(
                "contains a config.json but no weights", where=folder, fix="download the folder again"
            )
    official = sorted(
        file for file in path.iterdir() if "vae" in file.name.lower() and file.suffix in (".pth", ".pt")
    )
    if len(official) == 1:
        return _locate(official[0])
    found = "none" if not official else ", ".join(file.name for file in official)
    raise WeightsError(
        f"got {found}", where=path, expected="one VAE (Wan2.1_VAE.pth, or a vae folder of diffusers)"
    )


def _is_of_another_model(settings: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes another model, e.g. the transformer of an all-in-one file."""
    return settings.get("_class_name", _CLASS) != _CLASS or "model_type" in settings


def _check_statistics(settings: Mapping[str, Any], beside: Path) -> None:
    """Check the latent statistics. Raises WeightsError if one is not a list of usable numbers."""
    for name in _STATISTICS:
        if name not in settings:
            continue
        values = settings[name]
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or not all(
            abs(value) < 1e6 and (value > 0 or name == "latents_mean") for value in values
        ):
            positive = " greater than 0" if name == "latents_std" else ""
            raise WeightsError(
                f"got {'null' if values is None else values!s:.60}",
                where=f"{beside}:{name}",
                expected=f"one finite number{positive} per latent channel",
            )
        if len(values) != settings.get("z_dim", len(values)):
            raise WeightsError(
                f"got {len(values)} numbers",
                where=f"{beside}: {name}",
                expected=f"one for each of {settings['z_dim']} latent channels",
            )


def _build(settings: dict[str, Any], source: Path) -> AutoencoderKLWan:
    try:
        with torch.device("meta"):
            return AutoencoderKLWan.from_config(settings)
    except NOT_BUILT as error:
        raise WeightsError(
            f"cannot build a VAE with these sizes: {settings!s:.200} ({type(error).__name__})", where=source
        ) from None


def _chunks(video: Tensor) -> Iterator[Tensor]:
    yield video[:, :1]
    if video.shape[1] > 1:
        yield from torch.split(video[:, 1:], WAN.stride[0], dim=1)
