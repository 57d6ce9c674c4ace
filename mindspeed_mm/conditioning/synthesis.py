"""Conditions drawn for plain clips while features are extracted: no prepared files.

Draws follow from (seed, row).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mindspeed_mm.conditioning.annotate.opencv import opencv
from mindspeed_mm.conditioning.recipe import Draw, Recipe, draws
from mindspeed_mm.conditioning.tasks.catalog import TASKS
from mindspeed_mm.conditioning.tasks.spec import Clip, Sources, count_bounds
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.dataset import VaceDataset
from mindspeed_mm.data.forms import ArrayReader
from mindspeed_mm.data.images import WHITE, read_image
from mindspeed_mm.data.sample import SampleRecord, Synthesis
from mindspeed_mm.data.transforms import PixelSample, load_pixels, load_reference
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.files import format_json


class SynthesizedDataset:
    """The rows of a VaceDataset, each plain one `variants` times, each time with the task drawn for it."""

    def __init__(self, plain: VaceDataset, recipe: Recipe) -> None:
        self._plain = plain
        self.records: Sequence[SampleRecord] = synthesized(plain.records, recipe)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of the plain dataset: a draw is part of its record."""
        return self._plain.settings

    @property
    def load(self) -> Callable[[SampleRecord], PixelSample]:
        """Read one row, and make what is drawn for it."""
        return partial(load_synthesized, config=self._plain.config.preprocess_parameters)

    def describe(self) -> str:
        """`40 samples: inpainting_random 22, framerefext 18`."""
        drawn = [record.synthesis for record in self.records]
        counts = Counter("as it is" if item is None else item.task for item in drawn)
        return f"{len(drawn)} samples: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))


def synthesized(records: Iterable[SampleRecord], recipe: Recipe) -> list[SampleRecord]:
    """Each plain row as its variants.

    A row with a src_video or mask of its own, or that no entry takes, stays as it is.
    """
    found: list[SampleRecord] = []
    for record in records:
        drawn = draws(recipe, record.row, str(record.video)) if record.is_plain else []
        found += [
            replace(record, synthesis=drawn_as(draw, variant)) for variant, draw in enumerate(drawn)
        ] or [record]
    return found


def drawn_as(draw: Draw, variant: int = 0) -> Synthesis:
    """A draw as a record carries it."""
    return Synthesis(
        task=draw.task_name,
        options=format_json(draw.options.model_dump(mode="json", exclude={"annotators"})),
        annotators=str(getattr(draw.options, "annotators", "")),
        variant=variant,
    )


def load_synthesized(record: SampleRecord, config: VideoConfig) -> PixelSample:
    """One row in pixels, its src_video, mask and references made of its own clip.

    Raises DataError with the row's address.
    """
    pixels = load_pixels(record, config)
    if record.synthesis is None:
        return pixels
    try:
        return _with_conditions(pixels, record, record.synthesis)
    except MindSpeedMMError as error:
        address = f"{record.address}: " if record.address else ""
        raise error.as_kind(DataError).at(f"{address}task {record.synthesis.task}") from None


def _with_conditions(pixels: PixelSample, record: SampleRecord, drawn: Synthesis) -> PixelSample:
    opencv().setNumThreads(1)  # the other cores have processes of their own
    task = TASKS.get(drawn.task)
    values = json.loads(drawn.options)
    if "annotators" in task.options.model_fields:
        values["annotators"] = drawn.annotators
    with_images = count_bounds(task.needs, "image")[1] > 0
    images = tuple(read_image(path, WHITE) for path in record.src_ref_images) if with_images else ()
    names = tuple(map(str, record.src_ref_images)) if with_images else ()
    clip = Clip(ArrayReader(pixels.video))
    options = task.parse(values, f"task {task.name}")
    prepared = task.prepare(Sources(clips=(clip,), images=images, names=names), options)
    height, width = pixels.video.shape[1:3]
    references = tuple(load_reference(image, height, width).numpy() for image in prepared.references)
    steps = list(prepared.read())
    masks = [mask for _, mask in steps if mask is not None]
    return replace(
        pixels,
        src_video=np.stack([frame for frame, _ in steps]) if steps else None,
        src_mask=np.stack(masks) if masks else None,
        src_ref_images=references or pixels.src_ref_images,
        gray_is_missing=True,
    )
