"""The types that flow from a dataset to the model.

This module does not import torch, so that manifests can be read without it.

Legend: B batch · T,H,W pixels · F=(T+3)//4, h=H/8, w=W/8 latent grid · R references · L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from mindspeed_mm.data.config import MAX_REFERENCES
from mindspeed_mm.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    Picture = str | Path | NDArray[Any] | Tensor | Image.Image
    Clip = Picture | Sequence[Image.Image]
else:
    Clip = Picture = Any  # for pydantic, which evaluates the types of a job

C = TypeVar("C")
R = TypeVar("R")
Kind = Literal["clip", "mask", "picture"]  # what a file is read as


@dataclass(frozen=True, kw_only=True)
class Streams(Generic[C, R]):
    """The conditions of VACE, as paths, as pixels, or in any form that a user passes."""

    src_video: C | None = None  # the clip to edit, or the control clip
    src_mask: C | None = None  # 1, white = generate; 0, black = keep
    src_ref_images: Sequence[R] = ()


@dataclass(frozen=True, kw_only=True)
class Inputs(Streams["Clip", "Picture"]):
    """The inputs of one video, in any form that a user passes.

    A clip is a path, Pillow images, an array [T, H, W, 3] (uint8, or floats from 0 to 1) or a tensor [3, T,
    H, W] in [-1, 1]. A mask takes the same forms with one channel.
    """

    first_frame: Clip | None = None
    last_frame: Clip | None = None
    # Left, top, right, bottom, as fractions of the clip's size.
    outpaint: tuple[float, float, float, float] | None = None

    @property
    def given(self) -> bool:
        """Whether there is any input besides the prompt."""
        return self.src_video is not None or self.has_ends or len(self.src_ref_images) > 0

    @property
    def has_ends(self) -> bool:
        """Whether the first or last frames of the video are given."""
        return self.first_frame is not None or self.last_frame is not None

    def check(self, where: str = "", keys: Mapping[str, str] | None = None) -> None:
        """Raise ConfigError for contradictory inputs. `keys` maps fields to the names used in the message."""
        words = keys or {}
        video, *ends = (words.get(key, key) for key in ("src_video", "first_frame", "last_frame"))
        made = "which create their own src_video and src_mask"
        others = {"src_video": self.src_video, "src_mask": self.src_mask, "outpaint": self.outpaint}
        for name, value in others.items():
            key = words.get(name, name)
            address = f"{where}:{key}" if where else key
            if value is not None and self.has_ends:
                raise ConfigError(f"contradicts {'/'.join(ends)}, {made}", where=address, fix=f"remove {key}")
            if value is not None and self.src_video is None:
                raise ConfigError(f"applies to {video}, which is missing", where=address, fix=f"set {video}")
        if len(self.src_ref_images) > MAX_REFERENCES:
            key = words.get("src_ref_images", "src_ref_images")
            raise ConfigError(
                f"got {len(self.src_ref_images)} images",
                where=f"{where}:{key}" if where else key,
                expected=f"at most {MAX_REFERENCES}",
            )


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """The task drawn for a plain clip. Hashable and picklable."""

    task: str
    options: str  # JSON
    annotators: str = ""  # folder of the annotator networks
    variant: int = 0


class RowFile(NamedTuple):
    """One file of a dataset row, and the key that names it."""

    slot: str  # video, src_video, src_video_mask, src_ref_images[0], …
    path: Path

    @property
    def kind(self) -> Kind:
        """What the file is read as."""
        if self.slot == "src_video_mask":
            return "mask"
        return "picture" if self.slot.startswith("src_ref_images") else "clip"


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Streams[Path, Path]):
    """One row of a manifest: paths and captions, no tensors. Picklable."""

    video: Path
    captions: tuple[str, ...]  # at least one
    address: str = ""  # the row's name in errors: `data.json[17]`
    row: int = 0  # its index in the whole dataset
    synthesis: Synthesis | None = None  # the task that makes src_video, mask and references

    @property
    def is_plain(self) -> bool:
        """Whether a task can be drawn for the row, because it has neither a src_video nor a mask."""
        return self.src_video is None and self.src_mask is None

    @property
    def files(self) -> list[RowFile]:
        """The files that the row names."""
        single = [("video", self.video), ("src_video", self.src_video), ("src_video_mask", self.src_mask)]
        references = [RowFile(f"src_ref_images[{i}]", path) for i, path in enumerate(self.src_ref_images)]
        return [RowFile(slot, path) for slot, path in single if path is not None] + references


@dataclass(frozen=True, kw_only=True)
class Conditions(Streams[C, R]):
    """The conditions as the pixels that the model sees, on the CPU.

    Tensors are fp32: clips [3, T, H, W] in [-1, 1], mask [1, T, H, W] in [0, 1].
    """

    notes: tuple[str, ...] = ()  # changes made to fit the sources


@dataclass(frozen=True, kw_only=True)
class VideoSample(Conditions[C, R]):
    """One row of a dataset in pixels.

    The streams are tensors, or bytes for transfer between processes (`data.conditions.PixelSample`).
    """

    video: C  # the video that the model learns to generate
    captions: tuple[str, ...]
    fps: float  # rate of the sampled frames
    frame_indices: tuple[int, ...] = ()  # indices of these frames in the file
    gray_is_missing: bool = False  # bytes of 128 under src_mask are exactly 0 as a tensor
    frame_policy: str = ""  # how the frames were chosen: exact, trim, keep, pad, resample


@dataclass(frozen=True, kw_only=True)
class FeatureRecord:
    """One sample as the trainer reads it."""

    latents: Tensor  # [16, R+F, h, w], references first
    vace_context: Tensor  # [96, R+F, h, w]
    prompt_embeds: tuple[Tensor, ...]  # one [L, text_dim] for each caption, valid tokens only
    num_refs: int  # R
    key: str  # hash of everything that determines the file's content
    task: str = ""  # task that made the conditions, if known


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one latent shape, stacked."""

    latents: Tensor  # [B, 16, R+F, h, w]
    vace_context: Tensor | None  # [B, 96, R+F, h, w]; None for a trunk without a branch
    prompt_embeds: Tensor  # [B, L, text_dim], zero rows past each prompt's length
    prompt_lengths: Tensor  # [B]
    num_refs: int  # R, equal for all rows because it is part of the shape
    # [B] int64, the consumed-sample index of each row, which keys timestep, noise and caption choice.
    sample_index: Tensor
    keys: tuple[str, ...]  # FeatureRecord.key of each row
    tasks: tuple[str, ...] = ()  # FeatureRecord.task of each row

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to `device`. From pinned memory, the copy overlaps with compute."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory. The DataLoader of torch calls this method."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        from torch import Tensor

        moved: dict[str, Any] = {
            name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)
