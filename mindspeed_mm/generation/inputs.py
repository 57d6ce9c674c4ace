"""What a user brings → what the model is shown, in pixels. Nothing is changed without a note or against a policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mindspeed_mm.data.frames import FrameChoice, align, choose, frame_at
from mindspeed_mm.data.images import blank_mask, image_traits
from mindspeed_mm.data.sample import Clip, Inputs, Picture
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.transforms import (
    ArrayReader,
    Conditions,
    cut,
    fill,
    fill_nearest,
    load_reference,
    read_resized,
    to_tensor,
)
from mindspeed_mm.data.video import BLACK, WHITE, VideoReader, flatten, open_video
from mindspeed_mm.errors import DataError
from mindspeed_mm.generation.config import SamplingConfig
from mindspeed_mm.generation.parity import stretched_reference

_ROUNDING = 1e-3  # what pixels may lie outside their range by


def load_conditions(inputs: Inputs, sampling: SamplingConfig) -> Conditions:
    """Read everything and bring it to the size, rate and length requested. Raises DataError where the policies forbid it."""
    inputs.check()
    notes: list[str] = []
    video = mask = None
    if inputs.has_ends:
        video, mask = _between(inputs, sampling, notes)
    elif inputs.outpaint is not None:
        video, mask = _outpainted(inputs, sampling, notes)
    elif inputs.src_video is not None:
        video, mask = _edited(inputs, sampling, notes)
    load = stretched_reference if sampling.diffsynth_references else load_reference
    references = tuple(
        load(_picture(image), sampling.height, sampling.width) for image in inputs.src_ref_images
    )
    for image in inputs.src_ref_images:
        if isinstance(image, (str, Path)):
            notes.extend(f"{image}: {remark}" for remark in remarks_on(image_traits(Path(image))))
    return Conditions(src_video=video, src_mask=mask, src_ref_images=references, notes=tuple(notes))


def _edited(inputs: Inputs, sampling: SamplingConfig, notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """The source clip and its mask, frame by frame beside each other."""
    source = _open(inputs.src_video, notes)
    chosen = _choose(source, "src_video", sampling, notes)
    size = (sampling.height, sampling.width)
    _check_fit(source, "src_video", size, sampling, notes)
    video = _exact(inputs.src_video, 3, sampling)
    if video is None:
        video = to_tensor(read_resized(source, chosen.indices, size, fill))
    return video, _mask(inputs.src_mask, source, chosen, sampling, notes)


def _mask(
    mask: Clip | None, source: VideoReader, chosen: FrameChoice, sampling: SamplingConfig, notes: list[str]
) -> Tensor | None:
    """[1, T, H, W]; a still mask holds for the whole clip."""
    if mask is None:
        return None
    what, exact = "src_mask", _exact(mask, 1, sampling)
    if exact is None:
        reader = _open(mask, notes, mask=True)
        indices = align(
            f"src_mask {reader.path}",
            reader,
            source,
            chosen,
            against=f"src_video {source.path}",
            by_time=sampling.timing == "seconds",
        )
        values = read_resized(reader, indices, (sampling.height, sampling.width), fill_nearest)
        values = cut(values, reader.path, soft=sampling.soft_mask)
        what, exact = f"src_mask {reader.path}", torch.from_numpy(values).float().div_(255).unsqueeze(0)
    elif not sampling.soft_mask:
        exact = (exact > 0.5).float()
    levels = (int(255 * float(exact.min())), math.ceil(255 * float(exact.max())))
    if blank := blank_mask(levels, soft=sampling.soft_mask):
        notes.append(f"{what}: white {blank}: {_BLANK[blank]}")
    return exact


_BLANK = {
    "nowhere": "all of src_video is kept, nothing in it is generated; white = generate",
    "everywhere": "nothing of src_video is kept; black = keep",
}


def _outpainted(inputs: Inputs, sampling: SamplingConfig, notes: list[str]) -> tuple[Tensor, Tensor]:
    """The source small inside a grey frame; the frame is to be generated. A mask of the source holds inside."""
    left, top, right, bottom = inputs.outpaint or (0.0, 0.0, 0.0, 0.0)
    rows, columns = round(sampling.height / (1 + top + bottom)), round(sampling.width / (1 + left + right))
    y, x = round(rows * top), round(columns * left)
    y, x = min(y, sampling.height - rows), min(x, sampling.width - columns)
    source = _open(inputs.src_video, notes)
    chosen = _choose(source, "src_video", sampling, notes)
    _check_fit(source, "src_video", (rows, columns), sampling, notes)
    video = torch.zeros(3, sampling.num_frames, sampling.height, sampling.width)
    video[:, :, y : y + rows, x : x + columns] = to_tensor(
        read_resized(source, chosen.indices, (rows, columns), fill)
    )
    mask = torch.ones(1, sampling.num_frames, sampling.height, sampling.width)
    inner = sampling.model_copy(update={"height": rows, "width": columns})
    kept = _mask(inputs.src_mask, source, chosen, inner, notes)
    mask[:, :, y : y + rows, x : x + columns] = 0 if kept is None else kept
    notes.append(
        f"outpaint: the source stands at {columns}x{rows}+{x}+{y} of {sampling.width}x{sampling.height}"
    )
    return video, mask


def _between(inputs: Inputs, sampling: SamplingConfig, notes: list[str]) -> tuple[Tensor, Tensor]:
    """Given frames at the beginning, the end or both; grey between them, to be generated."""
    size = (sampling.height, sampling.width)
    video = torch.zeros(3, sampling.num_frames, *size)
    mask = torch.ones(1, sampling.num_frames, *size)
    total = 0
    for key, clip in (("first_frame", inputs.first_frame), ("last_frame", inputs.last_frame)):
        if clip is None:
            continue
        source = _open(clip, notes)
        _check_fit(source, key, size, sampling, notes)
        indices = _all_frames(source, sampling)
        total += len(indices)
        if total >= sampling.num_frames:
            raise DataError(
                f"{key} {source.path}: {total} frames are given of {sampling.num_frames}; nothing is left to generate"
            )
        place = (
            slice(0, len(indices))
            if key == "first_frame"
            else slice(sampling.num_frames - len(indices), None)
        )
        video[:, place] = to_tensor(read_resized(source, indices, size, fill))
        mask[:, place] = 0
        notes.append(f"{key}: {len(indices)} frame(s) kept")
    return video, mask


def _all_frames(source: VideoReader, sampling: SamplingConfig) -> tuple[int, ...]:
    if not source.timed or sampling.timing == "frames":
        return tuple(range(source.num_frames))
    count = max(1, round(source.duration * sampling.fps))
    return tuple(frame_at(source.times, i / sampling.fps) for i in range(count))


def _choose(source: VideoReader, key: str, sampling: SamplingConfig, notes: list[str]) -> FrameChoice:
    """The frames that the policies allow. Raises DataError naming the policies."""
    what = f"{key} {source.path} ({source.num_frames} frames, {source.fps:g} fps)"
    try:
        chosen = choose(source, sampling)
    except DataError as error:
        raise error.at(what) from None
    count, is_timed = len(chosen.indices), source.timed and sampling.timing == "seconds"
    if count != sampling.num_frames:
        raise DataError(
            f"wan_frames makes a video of {count} frames of it, num_frames is {sampling.num_frames}",
            where=what,
            fix=f"set num_frames to {count}",
        )
    if is_timed and not sampling.wan_frames and abs(source.fps - chosen.fps) > 0.01:
        notes.append(f"{what}: sampled at {chosen.fps:g} fps")
    if chosen.policy in _CHANGED:
        notes.append(f"{what}: {_CHANGED[chosen.policy].format(n=count)}")
    return chosen


_CHANGED = {
    "trim": "its first {n} frames are used",
    "pad": "its last frame is repeated up to {n} frames",
    "resample": "{n} frames are spread over all of it",
    "keep_last": "{n} frames are spread over all of it (wan_frames)",
}


def _check_fit(
    source: VideoReader, key: str, size: tuple[int, int], sampling: SamplingConfig, notes: list[str]
) -> None:
    if (source.height, source.width) == size:
        return
    found, wanted = f"{source.width}x{source.height}", f"{size[1]}x{size[0]}"
    if sampling.fit == "reject":
        raise DataError(
            f"{key} {source.path} is {found}, expected {wanted}; give it that size, or set fit to crop"
        )
    scale = max(size[0] / source.height, size[1] / source.width)
    lost = 1 - size[0] * size[1] / (source.height * source.width * scale**2)
    cropped = f", {lost:.0%} of its area cropped at the sides" if lost > 0.005 else ""
    notes.append(f"{key} {source.path}: resized from {found} to {wanted}{cropped}")


def _exact(clip: Clip | None, channels: int, sampling: SamplingConfig) -> Tensor | None:
    """A tensor that already has the right form, so that nothing of it is lost to bytes; else None."""
    shape = (channels, sampling.num_frames, sampling.height, sampling.width)
    return _values(clip) if isinstance(clip, Tensor) and tuple(clip.shape) == shape else None


def _values(clip: Tensor) -> Tensor:
    """fp32 on the CPU. Raises DataError for values that are no pixels, bytes above all: they would all become white."""
    values = clip.detach().cpu().float()
    low = -1 if clip.shape[0] == 3 else 0
    _check_range(float(values.min()), float(values.max()), low, "tensor")
    return values


def _check_range(least: float, most: float, low: int, kind: str) -> None:
    if not (least >= low - _ROUNDING and most <= 1 + _ROUNDING):  # so that NaN is refused too
        raise DataError(
            f"a clip {kind} holds values from {least:g} to {most:g}; wanted {low} to 1, or an array of bytes"
        )


def _open(clip: Clip | None, notes: list[str], *, mask: bool = False) -> VideoReader:
    """Any form of clip as a reader. Raises DataError for what is none."""
    if clip is None:
        raise DataError("expected a clip, got None")
    if isinstance(clip, (str, Path)):
        reader = open_video(clip, mask=mask)
        notes.extend(f"{clip}: {remark}" for remark in remarks_on(reader.traits))
        return reader
    if isinstance(clip, Image.Image):
        clip = [clip]
    if isinstance(clip, Tensor):
        return ArrayReader(_tensor_bytes(clip))
    if isinstance(clip, np.ndarray):
        return ArrayReader(_array_bytes(clip))
    return ArrayReader(np.stack([flatten(image, BLACK if mask else WHITE) for image in clip]))


def _tensor_bytes(clip: Tensor) -> NDArray[np.uint8]:
    """[3, T, H, W] in [-1, 1], or a mask [1, T, H, W] in [0, 1] → uint8 [T, H, W, 3]."""
    if clip.ndim != 4 or clip.shape[0] not in (1, 3):
        raise DataError(
            f"a clip tensor is {list(clip.shape)}; wanted [3, T, H, W] in [-1, 1], or a mask [1, T, H, W] in [0, 1]"
        )
    values = _values(clip)
    values = values * 255 if clip.shape[0] == 1 else (values + 1) * 127.5
    return values.round().clamp(0, 255).byte().expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().numpy()


def _array_bytes(clip: NDArray[Any]) -> NDArray[np.uint8]:
    """[T, H, W, 3], [T, H, W] or [H, W, 3], of bytes, booleans or floats from 0 to 1 → uint8 [T, H, W, 3]."""
    if clip.dtype != np.uint8:
        _check_range(float(clip.min()), float(clip.max()), 0, "array")
        clip = (np.asarray(clip, dtype=np.float64) * 255).round().clip(0, 255).astype(np.uint8)
    if clip.ndim == 3 and clip.shape[-1] == 3:
        clip = clip[None]
    return np.repeat(clip[..., None], 3, axis=-1) if clip.ndim == 3 else clip


def _picture(image: Picture) -> str | Path | Image.Image | NDArray[np.uint8]:
    """What load_reference reads."""
    if isinstance(image, Tensor):
        pixels: NDArray[np.uint8] = _tensor_bytes(image if image.ndim == 4 else image[:, None])[0]
        return pixels
    if isinstance(image, np.ndarray):
        picture: NDArray[np.uint8] = _array_bytes(image)[0]
        return picture
    return image
