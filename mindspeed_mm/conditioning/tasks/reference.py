"""Reference tasks: people or objects that must appear in the video, cut out on white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.annotate.opencv import Box, Frame, Mask
from mindspeed_mm.conditioning.annotate.shapes import clip_box, mask_box
from mindspeed_mm.conditioning.tasks.options import ReferenceMode, ReferenceOptions, TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Prepared, Sources, task
from mindspeed_mm.conditioning.tasks.subjects import check_mode, image_mask
from mindspeed_mm.errors import ConfigError, DataError

RECOMMENDED = 3  # maximum number of references that the released weights were trained with


def cut_out(image: Frame, mask: Mask) -> Frame:
    """Crop the image to the bounding box of the subject, and make the background white."""
    box = mask_box(mask)
    assert box is not None, "image_mask rejects empty masks"
    left, top, right, bottom = box
    inside = mask[top:bottom, left:right, None] > 127
    return np.where(inside, image[top:bottom, left:right], np.uint8(255))


def subjects(
    sources: Sources,
    mode: ReferenceMode,
    boxes: Sequence[Box],
    masks: Sequence[str],
    text: str,
    networks: Networks,
    first: int = 0,
) -> tuple[tuple[Frame, ...], list[str]]:
    """Return the subject of each image from index `first` on, and remarks for the user.

    Mode `plain` returns the images unchanged. Raises DataError and ConfigError.
    """
    images = sources.images[first:]
    for what, given in (("bbox", boxes), ("mask", masks)):
        if mode.startswith(what) and len(given) != len(images):
            raise ConfigError(
                f"got {len(given)}",
                where=f"mode {mode}: {what}",
                expected=f"one for each of {len(images)} image{'s' * (len(images) != 1)}",
            )
    check_mode(mode, text, networks)
    notes = []
    if len(images) > RECOMMENDED:
        notes.append(f"{len(images)} references: the released weights were trained with up to {RECOMMENDED}")
    found = []
    for index, image in enumerate(images):
        if mode == "plain":
            found.append(image)
            continue
        where = (
            sources.names[first + index] if first + index < len(sources.names) else f"image {first + index}"
        )
        box = boxes[index] if index < len(boxes) else None
        mask = masks[index] if index < len(masks) else None
        found.append(cut_out(image, image_mask(image, mode, box, mask, text, networks, where)))
    return tuple(found), notes


@task(
    "image_reference",
    "reference_anything",
    summary="the subjects of images, on white; --mode selects how to find them",
    needs=("images",),
    options=ReferenceOptions,
    family="reference",
)
def image_reference(sources: Sources, options: ReferenceOptions) -> Prepared:
    """Prepare references only."""
    networks = Networks(Path(options.annotators))
    found, notes = subjects(
        sources, options.mode, options.bbox, options.mask, options.text(options.mode), networks
    )
    return Prepared(references=found, notes=tuple(notes), networks=networks.used)


@task(
    "image_salient",
    summary="the salient subject of an image, on white",
    needs=("image",),
    options=TaskOptions,
    family="reference",
)
def image_salient(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare the salient subject of the image as a reference."""
    networks = Networks(Path(options.annotators))
    found, notes = subjects(sources, "salient", (), (), "", networks)
    return Prepared(references=found, notes=tuple(notes), networks=networks.used)


@task(
    "image_face",
    summary="the largest face of an image",
    needs=("image",),
    options=TaskOptions,
    family="reference",
    network="face",
)
def image_face(sources: Sources, options: TaskOptions) -> Prepared:
    """Prepare the crop of the face as a reference. Raises DataError if the image shows no face."""
    networks, image = Networks(Path(options.annotators)), sources.images[0]
    box: Box | None = networks.open("face")(image)
    if box is None:
        where = sources.names[0] if sources.names else "image 0"
        raise DataError("no face found", where=where, fix="use another image, or the task image_reference")
    left, top, right, bottom = clip_box(box, *image.shape[:2])
    return Prepared(references=(np.ascontiguousarray(image[top:bottom, left:right]),), networks=networks.used)
