"""Tasks that make training samples from plain clips without an annotator.

Masks are random, and the references are crops of the clip.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field, field_validator

from mindspeed_mm.conditioning.annotate.motion import motion_masks
from mindspeed_mm.conditioning.annotate.opencv import Frame, Mask, erase, opencv
from mindspeed_mm.conditioning.annotate.random_masks import SHAPES
from mindspeed_mm.conditioning.tasks.options import TaskOptions
from mindspeed_mm.conditioning.tasks.spec import Clip, Prepared, Sources, Step, task
from mindspeed_mm.registry import did_you_mean

MOTION = "motion"
# Weights published with another trainer. Strokes take the weight of its broken ellipses and circles.
WEIGHTS = {
    "box": 0.05,
    "all": 0.2,
    "after_first": 0.2,
    "middle": 0.2,
    "box_in_time": 0.05,
    "salt": 0.05,
    "small_boxes": 0.05,
    "ellipse": 0.05,
    "circle": 0.05,
    "frames": 0.05,
    "strokes": 0.05,
}


class CropOptions(TaskOptions):
    """Options for crops of the clip as references."""

    references: int = Field(
        default=0, ge=0, le=16, description="number of reference crops of the clip's frames"
    )


class RandomMaskOptions(CropOptions):
    """Options for the shapes of the random masks."""

    shapes: dict[str, float] = Field(
        default=WEIGHTS,
        min_length=1,
        description="weight of each mask shape; also accepts blobs and motion",
    )

    @field_validator("shapes")
    @classmethod
    def _are_known(cls, shapes: dict[str, float]) -> dict[str, float]:
        known = [*SHAPES, MOTION]
        for name, weight in shapes.items():
            if name not in known:
                raise ValueError(f"has no shape {name!r:.40}{did_you_mean(name, known)}; {', '.join(known)}")
            if not 0 < weight <= 1e6:
                raise ValueError(f"{name} expected a number above 0, got {weight:g}")
        return shapes


class ReferenceCropOptions(CropOptions):
    """Options for the number of crops, which is at least one."""

    references: int = Field(
        default=1, ge=1, le=16, description="number of reference crops of the clip's frames"
    )


@task(
    "inpainting_random",
    summary="random masks: boxes, frames, strokes, blobs, noise, moving regions",
    needs=("clip",),
    options=RandomMaskOptions,
    family="repaint",
    supports_training=True,
)
def inpainting_random(sources: Sources, options: RandomMaskOptions) -> Prepared:
    """Prepare the clip with gray under random masks of one shape, and crops of the clip as references."""
    clip = sources.clip
    generator = np.random.default_rng([options.seed, 2])
    names = sorted(options.shapes)
    weights = np.array([options.shapes[name] for name in names])
    name = str(generator.choice(names, p=weights / weights.sum()))
    seed = int(generator.integers(1 << 31))

    def masks() -> Iterator[Mask]:
        if name == MOTION:
            return motion_masks(clip.frames)
        return SHAPES[name](clip.num_frames, *clip.size, np.random.default_rng(seed))

    def steps() -> Iterator[Step]:
        for frame, mask in zip(clip.frames(), masks(), strict=True):
            yield erase(frame, mask), mask

    return Prepared(
        steps=steps,
        num_frames=clip.num_frames,
        size=clip.size,
        fps=clip.fps,
        references=clip_crops(clip, options.references, generator),
        notes=(f"mask: {name}",),
    )


@task(
    "reference_random",
    summary="crops of a clip's own frames, on white, as references",
    needs=("clip",),
    options=ReferenceCropOptions,
    family="reference",
    supports_training=True,
)
def reference_random(sources: Sources, options: ReferenceCropOptions) -> Prepared:
    """Prepare references only: the model generates the whole clip."""
    generator = np.random.default_rng([options.seed, 3])
    return Prepared(references=clip_crops(sources.clip, options.references, generator))


def clip_crops(clip: Clip, count: int, generator: np.random.Generator) -> tuple[Frame, ...]:
    """Return square crops of random frames, each at a random position on a white canvas of the clip's size.

    A crop covers 0.5 to 1 times the frame's shorter side, and is scaled to 0.5 to 1 times that side.
    """
    return tuple(_crop(clip, generator) for _ in range(count))


def _crop(clip: Clip, generator: np.random.Generator) -> Frame:
    cv2 = opencv()
    height, width = clip.size
    frame = clip.reader.read([int(generator.integers(clip.num_frames))])[0]
    side = max(1, round(min(height, width) * generator.uniform(0.5, 1)))
    top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
    size = max(1, round(min(height, width) * generator.uniform(0.5, 1)))
    crop = frame[top : top + side, left : left + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC)
    canvas = np.full((height, width, 3), 255, np.uint8)
    y, x = int(generator.integers(height - size + 1)), int(generator.integers(width - size + 1))
    canvas[y : y + size, x : x + size] = crop
    return canvas
