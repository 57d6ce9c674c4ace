"""The types that flow from a dataset to the model. Importing this module does not import torch: manifests are read without it.

Legend: B batch · T,H,W pixels · F=(T+3)//4, h=H/8, w=W/8 latent grid · R references · L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One row of a manifest: paths and captions, no tensors. Picklable."""

    video: Path
    captions: tuple[str, ...]  # at least one
    src_video: Path | None = None
    src_mask: Path | None = None  # a clip, an image or a folder of images; 1 = generate, 0 = keep
    src_ref_images: tuple[Path, ...] = ()
    address: str = ""  # `data.json[17]`: how errors name this row
    row: int = 0  # its place in the whole dataset


@dataclass(frozen=True, kw_only=True)
class VideoSample:
    """One sample in pixels, on the CPU: fp32 in [-1, 1]; mask in [0, 1]."""

    video: Tensor | None  # [3, T, H, W]; None when generating
    src_video: Tensor | None  # [3, T, H, W]
    src_mask: Tensor | None  # [1, T, H, W], 1 = generate
    src_ref_images: tuple[Tensor, ...]  # each [3, 1, H, W]
    captions: tuple[str, ...]
    fps: float  # of the sampled frames
    frame_indices: tuple[int, ...] = ()  # which frames of the file were taken
    frame_policy: str = ""  # how they were chosen: exact, trim, keep, pad, resample


@dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """One sample as the trainer reads it."""

    latents: Tensor  # [16, R+F, h, w], references first
    vace_context: Tensor  # [96, R+F, h, w]
    prompt_embeds: tuple[Tensor, ...]  # one [L, text_dim] for each caption, valid tokens only
    num_refs: int  # R
    key: str  # hash of everything the file contains


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one latent shape, stacked."""

    latents: Tensor  # [B, 16, R+F, h, w]
    vace_context: Tensor | None  # [B, 96, R+F, h, w]; None for a trunk without a branch
    prompt_embeds: Tensor  # [B, L, text_dim], zero rows past each prompt's length
    prompt_lengths: Tensor  # [B]
    num_refs: int  # R, one number: it is part of the shape
    sample_index: (
        Tensor  # [B] int64, consumed-sample index of each row: keys timestep, noise and caption choice
    )
    keys: tuple[str, ...]  # FeatureRecord.key of each row

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from pinned memory the copy overlaps with compute."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        from torch import Tensor

        moved: dict[str, Any] = {
            name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
