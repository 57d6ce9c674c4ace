"""Trains on raw clips.

Worker processes read the clips and build their conditions; the training process encodes them on the device.
Samples come in the same order as from the feature loader.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.conditioning.recipe import Recipe, entries_for, training_draw
from mindspeed_mm.conditioning.synthesis import to_synthesis
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder, encode_features
from mindspeed_mm.data.conditions import PixelSample, to_sample
from mindspeed_mm.data.loader import Collate, Draw, RankSampler, SampleOrder
from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.data.sample import Batch, FeatureRecord, SampleRecord
from mindspeed_mm.errors import DataError
from mindspeed_mm.training.metrics import READERS

GIVEN = "given"  # task of rows with their own src_video and mask, or without a matching entry in the recipe


@dataclass(frozen=True)
class PlannedSample:
    """One sample of the stream before its clip is read. Picklable."""

    record: SampleRecord  # includes the drawn condition
    sample_index: int
    task: str


@dataclass(frozen=True)
class PixelBatch:
    """A micro-batch in pixels, and the seconds that a worker process spent on it."""

    pixels: tuple[PixelSample, ...]
    seconds: float


@dataclass(frozen=True)
class LoadPixels:
    """The function that worker processes run. Picklable."""

    load: Callable[[SampleRecord], PixelSample]

    def __call__(self, planned: Sequence[PlannedSample]) -> PixelBatch:
        """Read the clips of one micro-batch and build their conditions. Raises DataError."""
        start = time.perf_counter()
        pixels = tuple(self.load(sample.record) for sample in planned)
        return PixelBatch(pixels, time.perf_counter() - start)


class SampleCosts:
    """Seconds spent on making samples since the last call of `take`.

    On an accelerator, events are recorded in the stream, so measuring does not stall the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def on_host(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to `name`."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    @contextmanager
    def on_device(self, name: str) -> Iterator[None]:
        """Add the device time of the block to `name`."""
        if self._device.type == "cpu":
            with self.on_host(name):
                yield
            return
        event = torch.get_device_module(self._device).Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    def add(self, name: str, seconds: float) -> None:
        """Add `seconds` to `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call: readers, wait for readers, VAE and text encoder."""
        for name, start, end in self._events:
            end.synchronize()
            self.add(name, start.elapsed_time(end) / 1000)
        found, self._seconds = self._seconds, {}
        self._events.clear()
        return {name: found.get(name, 0.0) for name in (READERS, "waiting", "vae", "text")}


class Stream:
    """The order and conditions of samples, a function of (seed, consumed-sample index)."""

    def __init__(
        self,
        records: Sequence[SampleRecord],
        grids: Sequence[tuple[int, int, int]],
        recipe: Recipe | None,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        """Create a stream. `grids` are the frames, height and width of each record's clip as encoded."""
        self.records, self.recipe, self.seed = records, recipe, seed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        shapes = [(grid, *self._fitting(record)) for record, grid in zip(records, grids, strict=True)]
        self.order = SampleOrder(shapes, micro_batch_size=micro_batch_size, seed=seed, shuffle=shuffle)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks that a sample can have, in the order of the recipe."""
        drawn = () if self.recipe is None else tuple(self.recipe.tasks)
        return (*drawn, *({GIVEN} - set(drawn)))

    def plan(self, draw: Draw) -> PlannedSample:
        """Return the record of a draw, with its task and condition. Raises ConfigError."""
        record = self.records[draw.record]
        first = draw.sample_index - draw.sample_index % self.micro_batch_size
        drawn = None
        if self.recipe is not None and record.is_plain:
            drawn = training_draw(
                self.recipe,
                str(record.video),
                seed=self.seed,
                sample_index=draw.sample_index,
                first_index=first,
                iteration=draw.sample_index // self.global_batch_size + 1,
            )
        if drawn is None:
            return PlannedSample(record, draw.sample_index, GIVEN)
        return PlannedSample(replace(record, synthesis=to_synthesis(drawn)), draw.sample_index, drawn.name)

    def _fitting(self, record: SampleRecord) -> tuple[object, ...]:
        """Return the properties that the records of one micro-batch must share.

        Records with equal properties get the same draws and have the same number of references.
        """
        entries = entries_for(self.recipe, str(record.video)) if self.recipe and record.is_plain else ()
        return entries, len(record.src_ref_images)


class RawBatches:
    """The endless stream of one rank's micro-batches.

    As with features, `consumed_samples` is its entire state.
    """

    def __init__(
        self,
        stream: Stream,
        load: Callable[[SampleRecord], PixelSample],
        vae: StreamEncoder,
        text: PromptCache,
        collate: Collate,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_workers: int = 0,
        timeout: float = 600.0,
    ) -> None:
        self.stream, self.load, self.vae, self.text, self.collate = stream, load, vae, text, collate
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.num_workers, self.timeout = num_workers, timeout
        self.costs = SampleCosts(vae.device)
        self.tasks = stream.tasks

    def batches(self, consumed_samples: int = 0) -> Generator[Batch, None, None]:
        """Yield micro-batches, starting after `consumed_samples` samples.

        Raises DataError with the address of a row that cannot be used.
        """
        given = 0
        with self._readers(self.num_workers) as ahead:
            rows = ahead.map(self._plans(consumed_samples))
            while True:
                with self.costs.on_host("waiting"):
                    row = next(rows, None)
                if row is None:
                    break
                yield self._batch(*row)
                given += 1
        # After a stop signal, workers accept no more work, but the current iteration still needs its samples.
        with self._readers(0) as here:
            for planned, made in here.map(islice(self._plans(consumed_samples), given, None)):
                yield self._batch(planned, made)

    def _readers(self, count: int) -> ReadAhead[list[PlannedSample], PixelBatch]:
        return ReadAhead(LoadPixels(self.load), num_workers=count, timeout=self.timeout, flag="")

    def _plans(self, consumed_samples: int) -> Iterator[list[PlannedSample]]:
        sampler = RankSampler(
            self.stream.order, dp_rank=self.dp_rank, dp_size=self.dp_size, consumed_samples=consumed_samples
        )
        for draws in sampler:
            yield [self.stream.plan(draw) for draw in draws]

    def _batch(self, planned: Sequence[PlannedSample], made: PixelBatch | DataError) -> Batch:
        if isinstance(made, DataError):
            raise made if made.where or len(planned) > 1 else made.at(planned[0].record.address)
        counts = sorted({len(pixels.src_ref_images) for pixels in made.pixels})
        if len(counts) > 1:
            raise DataError(
                (
                    f"a micro-batch of task {planned[0].task} has samples with {counts[0]} and {counts[-1]} "
                    "references"
                ),
                where=planned[0].record.address,
                fix="set --micro-batch-size 1",
            )
        self.costs.add(READERS, made.seconds)
        rows = [
            (self._encode(sample, pixels), sample.sample_index)
            for sample, pixels in zip(planned, made.pixels, strict=True)
        ]
        return self.collate.stack(rows)

    def _encode(self, sample: PlannedSample, pixels: PixelSample) -> FeatureRecord:
        """Encode one sample like feature extraction, including the rounding to bfloat16.

        Training on a raw clip and training on its extracted feature are therefore equivalent.
        """
        with self.costs.on_device("vae"):
            latents, context = encode_features(self.vae, to_sample(pixels))
        with self.costs.on_device("text"):
            prompt = self._prompt(sample)
        return FeatureRecord(
            latents=latents.to(torch.bfloat16),
            vace_context=context.to(torch.bfloat16),
            prompt_embeds=(prompt,),
            num_refs=len(pixels.src_ref_images),
            key=sample.record.address,
            task=sample.task,
        )

    def _prompt(self, sample: PlannedSample) -> Tensor:
        captions = sample.record.captions
        chosen = self.collate.caption(len(captions), sample.sample_index)
        if chosen is None and self.collate.null_prompt is not None:
            return self.collate.null_prompt
        return self.text.encode([captions[chosen or 0]])[0].to(self.vae.device, torch.bfloat16)
