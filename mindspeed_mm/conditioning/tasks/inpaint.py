"""Inpainting tasks: the subject is erased, and the model generates it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mindspeed_mm.conditioning.annotate.maskaug import MaskAugment
from mindspeed_mm.conditioning.annotate.networks import Networks
from mindspeed_mm.conditioning.annotate.opencv import erase
from mindspeed_mm.conditioning.tasks.options import SubjectOptions
from mindspeed_mm.conditioning.tasks.spec import Clip, Prepared, Sources, Step, task
from mindspeed_mm.conditioning.tasks.subjects import check_mode, image_mask, subject_masks

_MODES = ("mask", "bbox", "masktrack", "bboxtrack", "label", "caption")


def inpainting(sources: Sources, options: SubjectOptions) -> Prepared:
    """Prepare the clip with a gray subject, and the masks of the subject."""
    return inpainted(sources.clip, options, Networks(Path(options.annotators)))


def inpainted(clip: Clip, options: SubjectOptions, networks: Networks) -> Prepared:
    """Prepare the clip like `inpainting`, with the given networks."""
    check_mode(options.mode, options.text(options.mode), networks)
    notes: list[str] = []
    masked = subject_masks(clip, options, networks, notes)

    def steps() -> Iterator[Step]:
        for frame, mask in masked():
            yield erase(frame, mask), mask

    return Prepared(
        steps=steps,
        num_frames=clip.num_frames,
        size=clip.size,
        fps=clip.fps,
        notes=tuple(notes),
        networks=networks.used,
    )


@task(
    "image_inpainting",
    summary="erase the subject of an image and generate it again",
    needs=("image",),
    options=SubjectOptions,
    family="repaint",
)
def image_inpainting(sources: Sources, options: SubjectOptions) -> Prepared:
    """Prepare one image with a gray subject, and the mask of the subject."""
    networks, image = Networks(Path(options.annotators)), sources.images[0]
    box = options.bbox[0] if options.bbox else None
    text = options.text(options.mode)
    check_mode(options.mode, text, networks)
    found = image_mask(image, options.mode, box, options.mask, text, networks, f"mode {options.mode}")
    draw = MaskAugment.draw(
        options.maskaug_mode, np.random.default_rng([options.seed, 1]), options.maskaug_ratio
    )
    mask = draw(found)
    return Prepared(
        steps=lambda: iter([(erase(image, mask), mask)]),
        num_frames=1,
        size=image.shape[:2],
        networks=networks.used,
    )


task(
    "inpainting",
    summary="erase the subject of a clip and generate it again; --mode selects how to find it",
    needs=("clip",),
    options=SubjectOptions,
    family="repaint",
    supports_training=True,
)(inpainting)
for _mode in _MODES:
    task(
        f"inpainting_{_mode}",
        summary=f"inpainting with mode {_mode}",
        needs=("clip",),
        options=SubjectOptions,
        family="repaint",
        fixed={"mode": _mode},
        supports_training=True,
        network="ground" if _mode in ("label", "caption") else "",
    )(inpainting)
