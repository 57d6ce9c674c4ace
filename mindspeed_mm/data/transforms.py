"""Loads dataset rows and single files as pixels of the requested size and frame rate.

Generation uses the same `load_conditions`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mindspeed_mm.data.conditions import (
    PixelSample,
    Target,
    TensorSample,
    load_conditions,
    mask_tensor,
    to_sample,
    to_tensor,
)
from mindspeed_mm.data.config import ClipPolicy, VideoConfig
from mindspeed_mm.data.forms import Reader, as_reader
from mindspeed_mm.data.frames import (
    FrameChoice,
    LongClip,
    ShortClip,
    choose,
    target_size,
)
from mindspeed_mm.data.images import Frames
from mindspeed_mm.data.resize import (
    binarize,
    read_resized,
    resize_mask,
    resize_to_fill,
)
from mindspeed_mm.data.sample import SampleRecord
from mindspeed_mm.data.video import VideoReader, open_video
from mindspeed_mm.errors import DataError


def load_sample(record: SampleRecord, config: VideoConfig) -> TensorSample:
    """Load one dataset row as tensors. Raises DataError with the row's address."""
    return to_sample(load_pixels(record, config))


def load_pixels(record: SampleRecord, config: VideoConfig) -> PixelSample:
    """Load one dataset row as bytes, for the reading processes. Raises DataError with the row's address."""
    try:
        return _load(record, config)
    except DataError as error:
        raise (error.at(record.address) if record.address else error) from None


def _load(record: SampleRecord, config: VideoConfig) -> PixelSample:
    video = open_video(record.video, config.reader)
    chosen = choose(video, config.policy)
    size = target_size(video.height, video.width, config.max_hxw)
    target = Target(video, chosen)
    conditions = load_conditions(record, config.policy, size, target=target, reader=config.reader)
    return PixelSample(
        video=read_resized(video, chosen.indices, size, resize_to_fill),
        src_video=conditions.src_video,
        src_mask=conditions.src_mask,
        src_ref_images=tuple(reference.numpy() for reference in conditions.src_ref_images),
        notes=conditions.notes,
        captions=record.captions,
        fps=chosen.fps,
        frame_indices=chosen.indices,
        frame_policy=chosen.policy,
    )


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
    """Load a file, an image folder or frames [T, h, w, 3] as a clip [3, T, H, W] in [-1, 1].

    The clip is sampled at `fps` and has at most `num_frames` frames. Frames and image folders have no time
    stamps, so each image counts as one frame.
    """
    source, chosen = _open_and_choose(clip, num_frames, fps, policy, long_clip, reader)
    return to_tensor(read_resized(source, chosen.indices, (height, width), resize_to_fill))


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
    """Load a mask from a file, folder or array [T, h, w(, 3)] of 0..255 as [1, T, H, W]; 1 = generate.

    A still mask is repeated for all `num_frames`. Values are binarized at one half unless `soft`.
    """
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        mask = mask[None]
    source, chosen = _open_and_choose(mask, num_frames, fps, policy, long_clip, reader, mask=True)
    indices = (0,) * num_frames if source.num_frames == 1 else chosen.indices
    values = read_resized(source, indices, (height, width), resize_mask)
    values = binarize(values, source.path, soft=soft)
    return mask_tensor(values)


def _open_and_choose(
    clip: str | Path | Frames,
    num_frames: int,
    fps: float,
    policy: ShortClip,
    long_clip: LongClip,
    reader: Reader,
    mask: bool = False,
) -> tuple[VideoReader, FrameChoice]:
    source = as_reader(clip, reader, mask=mask)
    clip_policy = ClipPolicy(num_frames=num_frames, fps=fps, short_clip=policy, long_clip=long_clip)
    try:
        return source, choose(source, clip_policy)
    except DataError as error:
        raise error.at(source.path) from None
