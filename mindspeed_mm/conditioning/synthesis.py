"""Makes the conditions of plain clips on the fly, without prepared files.

Random choices depend only on the recipe's seed and the row.
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
from mindspeed_mm.data.conditions import PixelSample, load_reference
from mindspeed_mm.data.config import VideoConfig
from mindspeed_mm.data.dataset import VaceDataset
from mindspeed_mm.data.forms import ArrayReader
from mindspeed_mm.data.images import WHITE, read_image
from mindspeed_mm.data.sample import SampleRecord, Synthesis
from mindspeed_mm.data.transforms import load_pixels
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.files import format_json


class SynthesizedDataset:
    """A VaceDataset in which each plain row becomes `variants` rows, each with a task from the recipe."""

    def __init__(self, plain: VaceDataset, recipe: Recipe) -> None:
        self._plain = plain
        self.records: Sequence[SampleRecord] = synthesize_records(plain.records, recipe)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the plain dataset, without the recipe, because the records contain its draws."""
        return self._plain.settings

    @property
    def load(self) -> Callable[[SampleRecord], PixelSample]:
        """Return a function that reads one row and makes its conditions."""
        return partial(load_synthesized, config=self._plain.config.preprocess_parameters)

    def describe(self) -> str:
        """Return the number of rows per task, such as `40 samples: framerefext 18, inpainting_random 22`."""
        drawn = [record.synthesis for record in self.records]
        counts = Counter("as it is" if item is None else item.task for item in drawn)
        return f"{len(drawn)} samples: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))


def synthesize_records(records: Iterable[SampleRecord], recipe: Recipe) -> list[SampleRecord]:
    """Replace each plain row with its variants.

    Rows with their own src_video or mask, and rows to which no recipe entry applies, are not changed.
    """
    found: list[SampleRecord] = []
    for record in records:
        drawn = draws(recipe, record.row, str(record.video)) if record.is_plain else []
        found += [
            replace(record, synthesis=to_synthesis(draw, variant)) for variant, draw in enumerate(drawn)
        ] or [record]
    return found


def to_synthesis(draw: Draw, variant: int = 0) -> Synthesis:
    """Convert a draw to the form that a record stores."""
    return Synthesis(
        task=draw.task_name,
        options=format_json(draw.options.model_dump(mode="json", exclude={"annotators"})),
        annotators=str(getattr(draw.options, "annotators", "")),
        variant=variant,
    )


def load_synthesized(record: SampleRecord, config: VideoConfig) -> PixelSample:
    """Load one row as pixels, with src_video, mask and references made from its own clip.

    Raises DataError with the location of the row.
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
    opencv().setNumThreads(1)  # the reading processes already use all cores
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
