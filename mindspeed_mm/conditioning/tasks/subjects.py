"""Locates the subject of a clip or image, in any mode, for inpainting, layouts and references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mindspeed_mm.conditioning.annotate.maskaug import MaskAugment
from mindspeed_mm.conditioning.annotate.networks import ANNOTATORS, Networks
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame, Mask, opencv
from mindspeed_mm.conditioning.annotate.shapes import box_mask, clip_box, mask_box, show_box
from mindspeed_mm.conditioning.annotate.subject import (
    grabcut,
    salient_mask,
    track_box,
    track_box_masks,
    track_mask,
)
from mindspeed_mm.conditioning.tasks.options import ReferenceMode, SubjectOptions
from mindspeed_mm.conditioning.tasks.spec import Clip, open_task_mask
from mindspeed_mm.data.images import brightness
from mindspeed_mm.data.video import VideoReader
from mindspeed_mm.errors import ConfigError, DataError

MaskedFrames = Callable[[], Iterator[tuple[Frame, Mask]]]


def subject_masks(clip: Clip, options: SubjectOptions, networks: Networks, notes: list[str]) -> MaskedFrames:
    """Return the frames of the clip with the subject's masks, all augmented by the same draw.

    Checks the inputs now, and reads the frames on iteration. Raises DataError and ConfigError.
    """
    found = _found_masks(clip, options, networks, notes)
    draw = MaskAugment.draw(
        options.maskaug_mode, np.random.default_rng([options.seed, 1]), options.maskaug_ratio
    )
    if options.maskaug_mode == "random":
        notes.append(f"maskaug_mode random: {draw.shape}")
    return lambda: ((frame, draw(mask)) for frame, mask in found())


def _found_masks(clip: Clip, options: SubjectOptions, networks: Networks, notes: list[str]) -> MaskedFrames:
    mode, where = options.mode, f"mode {options.mode}"
    if mode in ("label", "caption"):
        return lambda: _grounded(clip, options, networks)
    if mode in ("mask", "masktrack"):
        reader = _open_mask(options.mask, where, notes)
        _note_size(reader, clip.size, notes)
        if mode == "mask":
            _check_length(reader, clip)
            return lambda: zip(clip.frames(), _given_masks(reader, clip), strict=False)
        first = _resized(brightness(reader.read([0]))[0], clip.size)
        _refuse_empty(first, f"{where}: {reader.path}")
        return lambda: track_mask(clip.frames(), first, refine=options.refine)
    if mode in ("bbox", "bboxtrack"):
        box = _one_box(options.bbox, where)
        _note_box(box, clip.size, notes)
        if mode == "bbox":
            still = box_mask(box, *clip.size)
            return lambda: ((frame, still) for frame in clip.frames())
        return lambda: _tracked(clip, box, options, networks)
    return _salient_masks(clip, options, networks)


def _salient_masks(clip: Clip, options: SubjectOptions, networks: Networks) -> MaskedFrames:
    """Return salient masks. Mode `salient` repeats the first mask; the tracking modes follow the subject."""
    first_frame = next(clip.frames())
    first = find_salient(first_frame, networks)
    _refuse_empty(first, f"mode {options.mode}: {clip.path}, frame 0")
    if options.mode == "salient":
        return lambda: ((frame, first) for frame in clip.frames())
    if options.mode == "salientmasktrack":
        return lambda: track_mask(clip.frames(), first, refine=options.refine)
    box = mask_box(first)
    assert box is not None
    return lambda: _tracked(clip, box, options, networks)


def _tracked(
    clip: Clip, box: Box, options: SubjectOptions, networks: Networks
) -> Iterator[tuple[Frame, Mask]]:
    """Yield masks within the tracked box, from the segmentation network if installed, else from GrabCut."""
    if options.refine and has_network(networks, "segment"):
        segment = networks.open("segment")
        for frame, found in track_box(clip.frames(), box):
            yield frame, segment(frame, found)
        return
    yield from track_box_masks(clip.frames(), box, refine=options.refine)


def _grounded(clip: Clip, options: SubjectOptions, networks: Networks) -> Iterator[tuple[Frame, Mask]]:
    first = ground(next(clip.frames()), options.text(options.mode), options.mode, networks)
    yield from _tracked(clip, first, options, networks)


def has_network(networks: Networks, kind: str) -> bool:
    """Return whether the folder contains all files of an annotator."""
    return kind in ANNOTATORS and all(
        (networks.folder / name).is_file() for name in ANNOTATORS.get(kind).files
    )


def check_mode(mode: str, text: str, networks: Networks) -> None:
    """Raise ConfigError if mode `label` or `caption` has no text or no grounding network."""
    if mode not in ("label", "caption"):
        return
    if not text:
        raise ConfigError(f"needs --{mode}", where=f"mode {mode}", fix=f"name the subject with --{mode}")
    if "ground" not in ANNOTATORS:
        raise ConfigError(
            "needs a grounding network, and no package provides the annotator 'ground'",
            where=f"mode {mode}",
            fix="install one that registers it (entry point mindspeed_mm.annotators), or use mode bboxtrack",
        )
    networks.open("ground")


def ground(frame: Frame, text: str, mode: str, networks: Networks) -> Box:
    """Return the box of the subject that `text` names. Raises DataError if it is not in the frame."""
    check_mode(mode, text, networks)
    found: Box | None = networks.open("ground")(frame, text)
    if found is None:
        raise DataError(
            f"{text!r} not found in frame 0", where=f"mode {mode}", fix="use another name, or pass --bbox"
        )
    return found


def find_salient(frame: Frame, networks: Networks) -> Mask:
    """Return the salient mask, from the network if its file is installed, else from `salient_mask`."""
    if has_network(networks, "salient"):
        found: Mask = networks.open("salient")(frame)
        return found
    return salient_mask(frame)


def image_mask(
    image: Frame,
    mode: ReferenceMode,
    box: Box | None,
    mask: str | None,
    text: str,
    networks: Networks,
    where: str,
) -> Mask:
    """Return the mask of the subject of one image.

    A tracking mode treats the image as the first frame of a clip. Raises DataError for an empty subject, and
    ConfigError for a missing box or mask.
    """
    height, width = image.shape[:2]
    if mode == "plain":
        return np.full((height, width), 255, np.uint8)
    if mode in ("label", "caption"):
        box, mode = ground(image, text, mode, networks), "bboxtrack"
    if mode in ("mask", "masktrack"):
        reader = _open_mask(mask, where, [])
        found = _resized(brightness(reader.read([0]))[0], (height, width))
    elif mode in ("bbox", "bboxtrack"):
        given = _one_box(() if box is None else (box,), where)
        clip_box(given, height, width, where)
        if mode == "bbox":
            found = box_mask(given, height, width, where)
        elif has_network(networks, "segment"):
            found = networks.open("segment")(image, given)
        else:
            found = grabcut(image, given)
    else:
        found = find_salient(image, networks)
    _refuse_empty(found, where)
    return found


def _open_mask(path: str | None, where: str, notes: list[str]) -> VideoReader:
    if path is None:
        raise ConfigError("needs a mask", where=where, fix="pass --mask FILE, white = the subject")
    return open_task_mask(path, notes)


def _one_box(boxes: Sequence[Box], where: str) -> Box:
    if len(boxes) != 1:
        raise ConfigError(
            f"got {len(boxes)}",
            where=f"{where}: bbox",
            expected="one box",
            fix="pass --bbox LEFT,TOP,RIGHT,BOTTOM",
        )
    return boxes[0]


def _note_box(box: Box, size: tuple[int, int], notes: list[str]) -> None:
    """Add a note if the box is clipped by the frame. Raises DataError for a box outside the frame."""
    inside = clip_box(box, *size)
    if inside != tuple(int(value) for value in box):
        notes.append(f"bbox {show_box(box)}: clipped to the frame: {show_box(inside)}")


def _note_size(reader: VideoReader, size: tuple[int, int], notes: list[str]) -> None:
    if (reader.height, reader.width) != size:
        notes.append(
            f"{reader.path}: mask resized from {reader.width}x{reader.height} to {size[1]}x{size[0]}, "
            "nearest pixel"
        )


def _check_length(reader: VideoReader, clip: Clip) -> None:
    if reader.num_frames not in (1, clip.num_frames):
        raise DataError(
            f"the mask has {reader.num_frames} frames, the clip {clip.num_frames}",
            where=reader.path,
            fix="cut both to one length, or use a still mask",
        )


def _given_masks(reader: VideoReader, clip: Clip) -> Iterator[Mask]:
    still = reader.num_frames == 1
    mask: Mask | None = None
    for index in range(clip.num_frames):
        if mask is None or not still:
            mask = _resized(brightness(reader.read([index]))[0], clip.size)
        yield mask


def _resized(mask: Mask, size: tuple[int, int]) -> Mask:
    """Resize a mask with nearest-neighbour interpolation and threshold it at one half."""
    if mask.shape != size:
        cv2 = opencv()
        mask = np.asarray(cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST))
    return np.where(mask > 127, 255, 0).astype(np.uint8)


def _refuse_empty(mask: Mask, where: str) -> None:
    if not mask.any():
        raise DataError("the subject's mask is empty", where=where, fix="set it with --bbox or --mask")
