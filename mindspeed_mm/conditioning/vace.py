"""Encodes pixels, masks and references to latents and vace_context, for both extraction and generation.

Each distinct clip is encoded once, clips of equal size share a batch, and constant gray is cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from mindspeed_mm.data.conditions import TensorSample
from mindspeed_mm.errors import DataError
from mindspeed_mm.geometry import WAN


class Vae(Protocol):
    """The VAE interface that conditioning requires."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, video: Tensor, /) -> Tensor:
        """Encode pixels [B, 3, T, H, W] in [-1, 1] to normalized fp32 latents [B, 16, F, h, w]."""
        ...


class StreamEncoder:
    """A VAE wrapper that does not encode the same pixels twice.

    A clip that is zero (mid-gray) everywhere is encoded alone, once for each length and size, and cached. The
    latents are bit-identical with and without the cache. `max_batch` is the maximum number of clips per VAE
    pass, all of one size. It is fixed for a run, so that the latents of a sample depend only on the sample.
    """

    def __init__(self, vae: Vae, *, max_batch: int = 1, max_gray: int = 64) -> None:
        self.vae = vae
        self.max_batch = max_batch
        self.max_gray = max_gray
        self.encoded = 0  # number of clips that the VAE encoded
        self.requested = 0  # number of clips passed to `encode`
        self._gray: OrderedDict[torch.Size, Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """The device of the pixels and latents."""
        return self.vae.device

    def encode(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips [3, T, H, W] of any sizes to fp32 latents [16, F, h, w], in the same order."""
        self.requested += len(streams)
        answers: dict[int, Tensor] = {}
        pending: list[int] = []
        source = {index: self._first_equal(streams, index) for index in range(len(streams))}
        for index, stream in enumerate(streams):
            if source[index] != index:
                continue
            if not stream.any():
                answers[index] = self._gray_latents(stream.shape)
            else:
                pending.append(index)
        for group in self._groups(streams, pending):
            encoded = self.vae.encode(torch.stack([streams[index] for index in group]))
            self.encoded += len(group)
            answers.update(zip(group, encoded.unbind(0), strict=True))
        return [answers[source[index]] for index in range(len(streams))]

    def _first_equal(self, streams: Sequence[Tensor], index: int) -> int:
        """Return the index of the first stream with the same pixels."""
        for earlier in range(index):
            if streams[earlier] is streams[index] or (
                streams[earlier].shape == streams[index].shape
                and torch.equal(streams[earlier], streams[index])
            ):
                return earlier
        return index

    def _groups(self, streams: Sequence[Tensor], pending: Sequence[int]) -> list[list[int]]:
        by_shape: dict[torch.Size, list[int]] = {}
        for index in pending:
            by_shape.setdefault(streams[index].shape, []).append(index)
        return [
            members[start : start + self.max_batch]
            for members in by_shape.values()
            for start in range(0, len(members), self.max_batch)
        ]

    def _gray_latents(self, shape: torch.Size) -> Tensor:
        if shape not in self._gray:
            self._gray[shape] = self.vae.encode(torch.zeros(1, *shape, device=self.device))[0]
            self.encoded += 1
            if len(self._gray) > self.max_gray:
                self._gray.popitem(last=False)
        self._gray.move_to_end(shape)
        return self._gray[shape]


def stream_encoder(vae: Vae | StreamEncoder) -> StreamEncoder:
    """Return `vae` if it is a StreamEncoder, otherwise wrap it in one with an empty cache."""
    return vae if isinstance(vae, StreamEncoder) else StreamEncoder(vae)


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """The parts of a vace_context that are known before the VAE runs. `mm-inspect` draws them."""

    inactive: Tensor  # [3, T, H, W], pixels to keep; 0 (mid-gray) elsewhere
    reactive: Tensor  # [3, T, H, W], pixels to generate; 0 elsewhere
    mask_cells: Tensor  # [64, F, h, w], one channel for each pixel of an 8x8 cell
    mask_frames: tuple[int, ...]  # for each latent frame, the index of the pixel frame that gives its mask
    references: tuple[Tensor, ...]  # each [3, 1, H, W]

    @property
    def streams(self) -> list[Tensor]:
        """The clips for the VAE to encode: inactive, reactive, then each reference as its own clip."""
        return [self.inactive, self.reactive, *self.references]


def plan_context(
    src_video: Tensor | None,
    src_mask: Tensor | None,
    src_ref_images: Sequence[Tensor] = (),
    *,
    num_frames: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> ContextPlan:
    """Split pixels [3, T, H, W] by the mask [1, T, H, W] (1 = generate).

    A missing src_video is replaced by zeros, a missing mask by ones. A soft mask is thresholded at 0.5 for
    the split and stays soft in the mask channels, as in the official code and diffusers. Raises DataError if
    sizes disagree, or do not fit the VAE (T = 4k+1) and the patches (H and W multiples of 16).
    """
    _check_size(num_frames, height, width)
    shape = (num_frames, height, width)
    video = torch.zeros(3, *shape) if src_video is None else src_video
    mask = torch.ones(1, *shape) if src_mask is None else src_mask
    _check_shape("src_video", video, (3, *shape))
    _check_shape("src_mask", mask, (1, *shape))
    for number, reference in enumerate(src_ref_images):
        _check_shape(f"src_ref_images[{number}]", reference, (3, 1, height, width))
    video, mask = video.to(device, torch.float32), mask.to(device, torch.float32)
    generate = (mask > 0.5).to(video.dtype)
    return ContextPlan(
        inactive=video * (1 - generate),
        reactive=video * generate,
        mask_cells=fold_mask(mask),
        mask_frames=mask_frames(num_frames),
        references=tuple(reference.to(device, torch.float32) for reference in src_ref_images),
    )


def plan_sample(sample: TensorSample, device: torch.device | str = "cpu") -> ContextPlan:
    """Split the clip of a dataset row by its mask. A mask without src_video applies to the target video.

    Raises DataError like `plan_context`.
    """
    num_frames, height, width = sample.video.shape[1:]
    is_mask_only = sample.src_video is None and sample.src_mask is not None
    return plan_context(
        sample.video if is_mask_only else sample.src_video,
        sample.src_mask,
        sample.src_ref_images,
        num_frames=num_frames,
        height=height,
        width=width,
        device=device,
    )


def fold_mask(mask: Tensor) -> Tensor:
    """Fold a mask [1, T, H, W] to [64, F, h, w].

    Each of the 64 pixels of an 8x8 cell becomes a channel. The kept frames are those of `mask_frames`.
    """
    cells = rearrange(mask, "1 t (h py) (w px) -> (py px) t h w", py=WAN.stride[1], px=WAN.stride[2])
    return cells[:, list(mask_frames(mask.shape[1]))]


def mask_frames(num_frames: int) -> tuple[int, ...]:
    """Return, for each of the (T+3)//4 latent frames, the index of the pixel frame that gives its mask.

    The indices follow torch's `nearest-exact` interpolation.
    """
    frames = torch.arange(num_frames, dtype=torch.float32)[None, None]
    size = WAN.latent_frames(num_frames)
    picked = torch.nn.functional.interpolate(frames, size=size, mode="nearest-exact")
    return tuple(int(frame) for frame in picked[0, 0])


def encode_vace_context(
    vae: Vae | StreamEncoder,
    src_video: Tensor | None,
    src_mask: Tensor | None,
    src_ref_images: Sequence[Tensor] = (),
    *,
    num_frames: int,
    height: int,
    width: int,
) -> Tensor:
    """Encode pixels [3, T, H, W], a mask [1, T, H, W] and R references [3, 1, H, W] to fp32 [96, R+F, h, w].

    The channels are 16 inactive, 16 reactive and 64 mask channels. References precede the frames. A reference
    has its latents in the inactive channels and zeros in the others. Raises DataError.
    """
    encoder = stream_encoder(vae)
    plan = plan_context(
        src_video,
        src_mask,
        src_ref_images,
        num_frames=num_frames,
        height=height,
        width=width,
        device=encoder.device,
    )
    inactive, reactive, *references = encoder.encode(plan.streams)
    return assemble_context(inactive, reactive, references, plan.mask_cells)


def assemble_context(
    inactive: Tensor, reactive: Tensor, references: Sequence[Tensor], mask_cells: Tensor
) -> Tensor:
    """Concatenate 2 × [16, F, h, w], R × [16, 1, h, w] and [64, F, h, w] to [96, R+F, h, w]."""
    clip = torch.cat([inactive, reactive, mask_cells.to(inactive.dtype)], dim=0)
    if not references:
        return clip
    latents = torch.cat(list(references), dim=1)
    empty = latents.new_zeros(clip.shape[0] - latents.shape[0], *latents.shape[1:])
    return torch.cat([torch.cat([latents, empty], dim=0), clip], dim=1)


def encode_features(vae: Vae | StreamEncoder, sample: TensorSample) -> tuple[Tensor, Tensor]:
    """Encode one sample to latents [16, R+F, h, w] and vace_context [96, R+F, h, w].

    All clips of the sample are passed to the encoder together. Raises DataError if sizes disagree.
    """
    encoder = stream_encoder(vae)
    plan = plan_sample(sample, encoder.device)
    video = sample.video.to(encoder.device, torch.float32)
    latents, inactive, reactive, *references = encoder.encode([video, *plan.streams])
    return torch.cat([*references, latents], dim=1), assemble_context(
        inactive, reactive, references, plan.mask_cells
    )


def _check_size(num_frames: int, height: int, width: int) -> None:
    if not WAN.fits_frames(num_frames):
        raise DataError(
            f"got {num_frames} frames",
            expected="4n + 1 frames, as the VAE takes 1 and then 4 at a time",
            fix=f"use {WAN.trim_frames(num_frames)}",
        )
    if height % WAN.token_side or width % WAN.token_side:
        raise DataError(
            f"got {width}x{height} pixels",
            expected="a width and height that are multiples of 16, the side of a token",
        )


def _check_shape(name: str, found: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(found.shape) != wanted:
        raise DataError(
            f"got {list(found.shape)}",
            where=name,
            expected=f"{list(wanted)}",
            fix="trim and resize it to match the clip",
        )
