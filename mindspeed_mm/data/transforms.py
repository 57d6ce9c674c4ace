"""Files → pixels of one size and one rate, as VACE's weights saw them. Extraction and generation both enter here.

Clips: resized to fill (bicubic with antialias, on uint8) and cut at the centre. Masks: nearest, then cut at one half.
References: letterboxed on white.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mindspeed_mm.data import sample
from mindspeed_mm.data.config import ClipPolicy, VideoConfig
from mindspeed_mm.data.frames import (
    FrameChoice,
    LongClip,
    ShortClip,
    align,
    choose,
    choose_frames,
    target_size,
    token_count,
)
from mindspeed_mm.data.images import WHITE, Frames, brightness, flatten, read_image, refuse_zero_one
from mindspeed_mm.data.sample import SampleRecord, VideoSample
from mindspeed_mm.data.video import VideoReader, open_video
from mindspeed_mm.errors import DataError

__all__ = [
    "PixelSample",
    "choose",
    "choose_frames",
    "load_clip",
    "load_mask",
    "load_pixels",
    "load_reference",
    "load_sample",
    "target_size",
    "to_sample",
    "token_count",
]

Resize = Callable[[Frames, int, int], Frames]  # frames [T, h, w, 3], height, width → [T, H, W, …]
Reader = Literal["decord", "av"]
_AT_ONCE = 8  # frames of the source's size that are held while a clip is read


# One sample as bytes, small enough to travel between processes: clips uint8 [T, H, W, 3], mask [T, H, W] of 0..255,
# references fp32 [3, 1, H, W] in [-1, 1]. `to_sample` makes tensors of it.
PixelSample = VideoSample[NDArray[Any], NDArray[np.float32]]
TensorSample = VideoSample[Tensor, Tensor]
Conditions = sample.Conditions[Tensor, Tensor]


def load_sample(record: SampleRecord, config: VideoConfig) -> TensorSample:
    """One row of a dataset in pixels. Raises DataError with the row's address."""
    return to_sample(load_pixels(record, config))


def load_pixels(record: SampleRecord, config: VideoConfig) -> PixelSample:
    """`load_sample` before the step to tensors: what a reading process hands over."""
    try:
        return _load(record, config)
    except DataError as error:
        raise DataError(f"{record.address}: {error}" if record.address else str(error)) from None


def to_sample(pixels: PixelSample) -> TensorSample:
    """Bytes to fp32: clips [3, T, H, W] in [-1, 1], mask [1, T, H, W] in [0, 1]."""
    mask = pixels.src_mask
    return TensorSample(
        video=to_tensor(pixels.video),
        src_video=None if pixels.src_video is None else to_tensor(pixels.src_video),
        src_mask=None if mask is None else torch.from_numpy(mask).float().div_(255).unsqueeze(0),
        src_ref_images=tuple(torch.from_numpy(reference) for reference in pixels.src_ref_images),
        captions=pixels.captions,
        fps=pixels.fps,
        frame_indices=pixels.frame_indices,
        frame_policy=pixels.frame_policy,
    )


def _load(record: SampleRecord, config: VideoConfig) -> PixelSample:
    video = open_video(record.video, config.reader)
    chosen = choose(video, config.policy)
    size = target_size(video.height, video.width, config.max_hxw)
    source = mask = None
    if record.src_video is not None:
        other = open_video(record.src_video, config.reader)
        source = read_resized(other, align("src_video", other, video, chosen), size, fill)
    if record.src_mask is not None:
        other = open_video(record.src_mask, config.reader, mask=True)
        mask = read_resized(other, align("src_video_mask", other, video, chosen), size, fill_nearest)
        mask = cut(mask, record.src_mask, soft=config.soft_mask)
    pixels = read_resized(video, chosen.indices, size, fill)
    return PixelSample(
        video=pixels,
        src_video=source,
        src_mask=mask,
        src_ref_images=tuple(load_reference(path, *size).numpy() for path in record.src_ref_images),
        captions=record.captions,
        fps=chosen.fps,
        frame_indices=chosen.indices,
        frame_policy=chosen.policy,
    )


def read_resized(
    reader: VideoReader, indices: Sequence[int], size: tuple[int, int], resize: Resize
) -> Frames:
    """The frames at `indices` in `size` (height, width). A few at a time, so that a long 4K clip needs little memory."""
    wanted = sorted(set(indices))
    parts = [resize(reader.read(wanted[i : i + _AT_ONCE]), *size) for i in range(0, len(wanted), _AT_ONCE)]
    frames = np.concatenate(parts)
    place = {index: i for i, index in enumerate(wanted)}
    return frames if list(indices) == wanted else frames[[place[index] for index in indices]]


def fill(frames: Frames, height: int, width: int) -> Frames:
    """[T, h, w, 3] → [T, H, W, 3]: scaled until both sides are covered (bicubic, antialias, uint8), cut at the centre."""
    scaled = _scaled_size(frames, height, width)
    if frames.shape[1:3] != scaled:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        pixels = interpolate(pixels, size=scaled, mode="bicubic", antialias=True, align_corners=False)
        frames = pixels.permute(0, 2, 3, 1).numpy()
    return _centre(frames, height, width)


def fill_nearest(frames: Frames, height: int, width: int) -> NDArray[np.uint8]:
    """Mask frames [T, h, w, 3] → their brightness [T, H, W], nearest pixel, same scale and cut as `fill`."""
    grey = brightness(frames)
    rows, columns = _scaled_size(frames, height, width)
    y = np.arange(rows) * grey.shape[1] // rows
    x = np.arange(columns) * grey.shape[2] // columns
    return _centre(grey[:, y][:, :, x], height, width)


def cut(mask: NDArray[np.uint8], path: Path | str = "(frames)", *, soft: bool = False) -> NDArray[np.uint8]:
    """Mask values → 0 or 255, cut at one half unless `soft`. Raises DataError for a mask written as 0 and 1 of 255."""
    refuse_zero_one(path, int(mask.max(initial=0)))
    return mask if soft else np.where(mask > 127, 255, 0).astype(np.uint8)


def _scaled_size(frames: Frames, height: int, width: int) -> tuple[int, int]:
    rows, columns = frames.shape[1:3]
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def _centre(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def to_tensor(frames: Frames) -> Tensor:
    """uint8 [T, H, W, 3] → fp32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def load_clip(
    clip: str | Path | Frames,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float = 16.0,
    policy: ShortClip = "keep",
    long_clip: LongClip = "trim",
    reader: Reader = "av",
) -> Tensor:
    """A file, an image folder or frames [T, h, w, 3] → [3, T, H, W] in [-1, 1], sampled at `fps`, at most `num_frames`.

    Frames and images carry no clock and are taken one by one.
    """
    source, chosen = _open_and_choose(clip, num_frames, fps, policy, long_clip, reader)
    return to_tensor(read_resized(source, chosen.indices, (height, width), fill))


def load_mask(
    mask: str | Path | NDArray[np.uint8],
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float = 16.0,
    policy: ShortClip = "keep",
    long_clip: LongClip = "trim",
    soft: bool = False,
    reader: Reader = "av",
) -> Tensor:
    """A mask file, image, folder, or array [T, h, w] or [T, h, w, 3] of 0..255 → [1, T, H, W], 1 = generate, 0 = keep.

    A still mask holds for all `num_frames`. Cut at one half unless `soft`.
    """
    if isinstance(mask, np.ndarray) and mask.ndim in (2, 3):
        mask = np.repeat(mask.reshape(-1, *mask.shape[-2:])[..., None], 3, axis=-1)
    source, chosen = _open_and_choose(mask, num_frames, fps, policy, long_clip, reader, mask=True)
    indices = (0,) * num_frames if source.num_frames == 1 else chosen.indices
    values = read_resized(source, indices, (height, width), fill_nearest)
    values = cut(values, source.path, soft=soft)
    return torch.from_numpy(values).float().div_(255).unsqueeze(0)


def load_reference(image: str | Path | Image.Image | Frames, height: int, width: int) -> Tensor:
    """An image (file, Pillow image, or array [h, w, 3]) letterboxed on white → [3, 1, H, W] in [-1, 1]."""
    if isinstance(image, Image.Image):
        image = flatten(image, WHITE)
    pixels = image if isinstance(image, np.ndarray) else read_image(image, WHITE)
    picture = to_tensor(np.array(pixels)[None])  # [3, 1, h, w]
    rows, columns = picture.shape[2:]
    if (rows, columns) == (height, width):
        return picture
    scale = min(height / rows, width / columns)
    inner = (max(1, int(rows * scale)), max(1, int(columns * scale)))
    picture = interpolate(picture.permute(1, 0, 2, 3), size=inner, mode="bilinear", align_corners=False)
    canvas = torch.ones(3, 1, height, width)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas[:, 0, top : top + inner[0], left : left + inner[1]] = picture[0]
    return canvas


def _open_and_choose(
    clip: str | Path | Frames,
    num_frames: int,
    fps: float,
    policy: ShortClip,
    long_clip: LongClip,
    reader: Reader,
    mask: bool = False,
) -> tuple[VideoReader, FrameChoice]:
    source: VideoReader = (
        ArrayReader(clip) if isinstance(clip, np.ndarray) else open_video(clip, reader, mask=mask)
    )
    clip_policy = ClipPolicy(num_frames=num_frames, fps=fps, short_clip=policy, long_clip=long_clip)
    try:
        return source, choose(source, clip_policy)
    except DataError as error:
        raise error.at(source.path) from None


class ArrayReader:
    """Frames that are in memory already, behind the same protocol."""

    timed = False
    traits: tuple[str, ...] = ()

    def __init__(self, frames: Frames) -> None:
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
            raise DataError(f"frames are {frames.dtype} {list(frames.shape)}, wanted uint8 [T, H, W, 3]")
        self._frames = frames
        self.path = Path("(frames)")
        self.num_frames, self.height, self.width = frames.shape[:3]
        self.fps = 16.0
        self.times = [i / self.fps for i in range(self.num_frames)]
        self.duration = self.num_frames / self.fps

    def read(self, indices: Sequence[int]) -> Frames:
        """Frames at `indices`."""
        return self._frames[list(indices)]
