"""Loads clips, masks and references, given as paths or in memory, as the pixels that the model sees.

Used by extraction, generation and inspection. Every change to the input is noted, and no change violates the
policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mindspeed_mm.data import sample
from mindspeed_mm.data.config import ClipPolicy
from mindspeed_mm.data.forms import Reader, as_image, as_reader, checked_values
from mindspeed_mm.data.frames import FrameChoice, align, choose, frame_at
from mindspeed_mm.data.images import WHITE, Frames, blank_remark, flatten, image_traits, read_image
from mindspeed_mm.data.resize import (
    Size,
    binarize,
    read_resized,
    resize_mask,
    resize_to_fill,
)
from mindspeed_mm.data.sample import Clip, Inputs, Streams, VideoSample
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.video import VideoReader, open_video
from mindspeed_mm.errors import DataError

Conditions = sample.Conditions[Tensor, Tensor]
# Clips are uint8 [T, H, W, 3] and masks uint8 [T, H, W]. fp32 tensors already have the form of Conditions.
ReadConditions = sample.Conditions[Any, Tensor]
# One sample as bytes, small enough to pass between processes: clips uint8 [T, H, W, 3], mask uint8 [T, H, W],
# references fp32 [3, 1, H, W] in [-1, 1]. `to_sample` converts it to tensors.
PixelSample = VideoSample[NDArray[Any], NDArray[np.float32]]
TensorSample = VideoSample[Tensor, Tensor]
_CHANGED = {
    "trim": "the first {n} frames are used",
    "pad": "the last frame is repeated to make {n} frames",
    "resample": "{n} frames are sampled evenly from the whole clip",
    "keep_last": "{n} frames are sampled evenly from the whole clip (wan_frames)",
}


@dataclass(frozen=True)
class Target:
    """The clip of a row, with the chosen frames that the other streams are aligned to."""

    reader: VideoReader
    chosen: FrameChoice
    name: str = "video"  # name of the clip in messages
    mask: str = "src_video_mask"  # name of the mask in messages


def load_conditions(
    inputs: Streams[Any, Any],
    policy: ClipPolicy,
    size: Size,
    *,
    target: Target | None = None,
    reader: Reader = "av",
    stretch: bool = False,
) -> ReadConditions:
    """Read all inputs and convert them to the requested size, rate and length.

    `to_tensors` converts the result to fp32. `target` is the video of a dataset row. Without a target,
    `inputs` are `Inputs`, and frames are chosen from src_video itself. `stretch` stretches references as
    DiffSynth-Studio does. Raises ConfigError for contradictory inputs, and DataError if the policy forbids
    what the model would receive.
    """
    load = _Loader(policy, size, reader)
    video = mask = None
    if target is not None:
        video, mask = load.beside(target, inputs.src_video, inputs.src_mask)
    elif isinstance(inputs, Inputs):
        inputs.check()
        if inputs.has_ends:
            video, mask = load.between(inputs)
        elif inputs.outpaint is not None:
            video, mask = load.outpainted(inputs, inputs.outpaint)
        elif inputs.src_video is not None:
            video, mask = load.edited(inputs)
    read_reference = stretched_reference if stretch else load_reference
    references = tuple(read_reference(as_image(image), *size) for image in inputs.src_ref_images)
    for image in inputs.src_ref_images if target is None else ():  # the dataset check reports it for rows
        if isinstance(image, (str, Path)):
            load.notes.extend(f"{image}: {remark}" for remark in remarks_on(image_traits(Path(image))))
    return ReadConditions(src_video=video, src_mask=mask, src_ref_images=references, notes=tuple(load.notes))


def to_tensors(read: ReadConditions) -> Conditions:
    """Convert bytes to fp32: clips [3, T, H, W] in [-1, 1], mask [1, T, H, W] in [0, 1]."""
    video, mask = read.src_video, read.src_mask
    return Conditions(
        src_video=to_tensor(video) if isinstance(video, np.ndarray) else video,
        src_mask=mask_tensor(mask) if isinstance(mask, np.ndarray) else mask,
        src_ref_images=tuple(read.src_ref_images),
        notes=read.notes,
    )


def to_sample(pixels: PixelSample) -> TensorSample:
    """Convert bytes to fp32: clips [3, T, H, W] in [-1, 1], mask [1, T, H, W] in [0, 1]."""
    mask = pixels.src_mask
    source = None if pixels.src_video is None else to_tensor(pixels.src_video)
    if pixels.gray_is_missing and source is not None and mask is not None and pixels.src_video is not None:
        missing = torch.from_numpy((pixels.src_video == 128).all(axis=-1) & (mask > 127))
        source[:, missing] = 0
    return TensorSample(
        video=to_tensor(pixels.video),
        src_video=source,
        src_mask=None if mask is None else mask_tensor(mask),
        src_ref_images=tuple(torch.from_numpy(reference) for reference in pixels.src_ref_images),
        captions=pixels.captions,
        fps=pixels.fps,
        frame_indices=pixels.frame_indices,
        frame_policy=pixels.frame_policy,
    )


def to_tensor(frames: Frames) -> Tensor:
    """Convert uint8 [T, H, W, 3] to fp32 [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def mask_tensor(mask: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 [T, H, W] to fp32 [1, T, H, W] in [0, 1]."""
    return torch.from_numpy(mask).float().div_(255).unsqueeze(0)


def load_reference(image: str | Path | Image.Image | Frames, height: int, width: int) -> Tensor:
    """Letterbox an image (file, Pillow image or array [h, w, 3]) on white to [3, 1, H, W] in [-1, 1]."""
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


def stretched_reference(
    image: str | Path | Image.Image | NDArray[np.uint8], height: int, width: int
) -> Tensor:
    """Stretch an image of any aspect ratio to [3, 1, H, W] in [-1, 1]."""
    if isinstance(image, Image.Image):
        image = flatten(image, WHITE)
    pixels = image if isinstance(image, np.ndarray) else read_image(image, WHITE)
    stretched = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(np.array(stretched)[None])


@dataclass
class _Loader:
    """Loads the streams of one video with their common policy, size and notes."""

    policy: ClipPolicy
    size: Size
    reader: Reader
    notes: list[str] = field(default_factory=list)  # changes made to fit the sources

    def open(self, clip: Clip | VideoReader, *, mask: bool = False) -> VideoReader:
        """Open a clip in any form as a reader and note its traits."""
        if not isinstance(clip, (str, Path)):
            return as_reader(clip, self.reader, mask=mask)
        found = open_video(clip, self.reader, mask=mask)
        self.notes.extend(f"{clip}: {remark}" for remark in remarks_on(found.traits))
        return found

    def beside(self, target: Target, clip: Clip | VideoReader | None, mask: Clip | None) -> tuple[Any, Any]:
        """Read src_video and its mask, aligned frame by frame with the target."""
        video: Any = None
        if _has_shape(clip, 3, len(target.chosen.indices), *self.size):
            video = checked_values(clip)
        elif clip is not None:
            source = self.open(clip)
            indices = align("src_video", source, target.reader, target.chosen, against=target.name)
            self.check_fit(source, "src_video")
            video = read_resized(source, indices, self.size, resize_to_fill)
        return video, self.mask(target, mask)

    def mask(self, target: Target, mask: Clip | None) -> Any:
        """Read the mask as uint8 [T, H, W], or as fp32 [1, T, H, W] if it is given in that form.

        A still mask applies to the whole clip.
        """
        if mask is None:
            return None
        soft, what = self.policy.soft_mask, "src_mask"
        pixels: Any
        if not _has_shape(mask, 1, len(target.chosen.indices), *self.size):
            source = self.open(mask, mask=True)
            what = f"src_mask {source.path}"
            indices = align(
                target.mask if target.name == "video" else what,
                source,
                target.reader,
                target.chosen,
                against=target.name,
                by_time=self.policy.timing == "seconds",
            )
            pixels = binarize(read_resized(source, indices, self.size, resize_mask), source.path, soft=soft)
            levels = (int(pixels.min()), int(pixels.max()))
        else:
            pixels = checked_values(mask)
            pixels = pixels if soft else (pixels > 0.5).float()
            levels = (int(255 * float(pixels.min())), math.ceil(255 * float(pixels.max())))
        if remark := blank_remark(levels, soft=soft):
            self.notes.append(f"{what}: {remark}")
        return pixels

    def own_target(self, clip: Clip) -> Target:
        """Return src_video as the target, with frames chosen from src_video itself."""
        source = self.open(clip)
        chosen = self.choose(source)
        return Target(source, chosen, f"src_video {source.path}", "src_mask")

    def edited(self, inputs: Inputs) -> tuple[Any, Any]:
        """Read the source clip and its mask."""
        assert inputs.src_video is not None
        target = self.own_target(inputs.src_video)
        is_exact = _has_shape(inputs.src_video, 3, self.policy.num_frames, *self.size)
        return self.beside(target, inputs.src_video if is_exact else target.reader, inputs.src_mask)

    def outpainted(self, inputs: Inputs, edges: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
        """Place the source, reduced in size, inside a gray border that the model generates.

        Inside the source, its own mask applies.
        """
        assert inputs.src_video is not None
        left, top, right, bottom = edges
        height, width = self.size
        rows, columns = round(height / (1 + top + bottom)), round(width / (1 + left + right))
        y, x = min(round(rows * top), height - rows), min(round(columns * left), width - columns)
        inner = replace(self, size=(rows, columns))  # shares the list of notes
        target = inner.own_target(inputs.src_video)
        pixels, kept = inner.beside(target, target.reader, inputs.src_mask)
        video, mask = self.gray()
        inside = to_tensors(ReadConditions(src_video=pixels, src_mask=kept))
        assert inside.src_video is not None
        video[:, :, y : y + rows, x : x + columns] = inside.src_video
        mask[:, :, y : y + rows, x : x + columns] = 0 if inside.src_mask is None else inside.src_mask
        self.notes.append(f"outpaint: the source is at {columns}x{rows}+{x}+{y} of {width}x{height}")
        return video, mask

    def between(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Place the given frames at the beginning, the end or both; the rest is gray, to be generated."""
        video, mask = self.gray()
        count, total = self.policy.num_frames, 0
        for key, clip in (("first_frame", inputs.first_frame), ("last_frame", inputs.last_frame)):
            if clip is None:
                continue
            source = self.open(clip)
            self.check_fit(source, key)
            indices = self.all_frames(source)
            total += len(indices)
            if total >= count:
                raise DataError(
                    f"gives all {total} of {count} frames; nothing is left to generate",
                    where=f"{key} {source.path}",
                )
            span = slice(0, len(indices)) if key == "first_frame" else slice(count - len(indices), None)
            video[:, span] = to_tensor(read_resized(source, indices, self.size, resize_to_fill))
            mask[:, span] = 0
            self.notes.append(f"{key}: {len(indices)} frame(s) kept")
        return video, mask

    def gray(self) -> tuple[Tensor, Tensor]:
        """Return an all-gray src_video and a mask that generates every pixel."""
        count = self.policy.num_frames
        return torch.zeros(3, count, *self.size), torch.ones(1, count, *self.size)

    def all_frames(self, source: VideoReader) -> tuple[int, ...]:
        """Return the indices of all frames of a clip, sampled at the rate of the video."""
        fps = self.policy.fps
        if not source.timed or self.policy.timing == "frames":
            return tuple(range(source.num_frames))
        count = max(1, round(source.duration * fps))
        return tuple(frame_at(source.times, i / fps) for i in range(count))

    def choose(self, source: VideoReader) -> FrameChoice:
        """Choose frames of src_video by the policy. Raises DataError that names the policies."""
        policy = self.policy
        what = f"src_video {source.path} ({source.num_frames} frames, {source.fps:g} fps)"
        try:
            chosen = choose(source, policy)
        except DataError as error:
            raise error.at(what) from None
        count, is_timed = len(chosen.indices), source.timed and policy.timing == "seconds"
        if count != policy.num_frames:
            raise DataError(
                f"wan_frames selects {count} frames, but num_frames is {policy.num_frames}",
                where=what,
                fix=f"set num_frames to {count}",
            )
        if is_timed and not policy.wan_frames and abs(source.fps - chosen.fps) > 0.01:
            self.notes.append(f"{what}: sampled at {chosen.fps:g} fps")
        if chosen.policy in _CHANGED:
            self.notes.append(f"{what}: {_CHANGED[chosen.policy].format(n=count)}")
        return chosen

    def check_fit(self, source: VideoReader, key: str) -> None:
        """Note what resizing cuts off. Raises DataError if the policy forbids it."""
        height, width = self.size
        if (source.height, source.width) == self.size:
            return
        found, wanted = f"{source.width}x{source.height}", f"{width}x{height}"
        if self.policy.fit == "reject":
            raise DataError(
                f"{key} {source.path} is {found}",
                expected=wanted,
                fix="resize it, or set fit to crop",
            )
        scale = max(height / source.height, width / source.width)
        lost = 1 - height * width / (source.height * source.width * scale**2)
        cropped = f", {lost:.0%} of its area cropped at the sides" if lost > 0.005 else ""
        self.notes.append(f"{key} {source.path}: resized from {found} to {wanted}{cropped}")


def _has_shape(clip: object, *shape: int) -> TypeGuard[Tensor]:
    """Return whether a clip is a tensor of this shape, which is used as it is, without rounding to bytes."""
    return isinstance(clip, Tensor) and tuple(clip.shape) == shape
