"""Extracts features from the rows of a dataset: reads ahead, encodes, and writes in the background.

Intact features are not changed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_mm.conditioning.reading import FeatureKeys, ReadResult, ReadRow, ReadTask, stored_info
from mindspeed_mm.conditioning.text import PromptCache
from mindspeed_mm.conditioning.vace import StreamEncoder, encode_features
from mindspeed_mm.data.conditions import PixelSample, to_sample
from mindspeed_mm.data.content import (
    STATE_FOLDER,
    ContentIndex,
    PartIndex,
)
from mindspeed_mm.data.dataset import FEATURE_FOLDER
from mindspeed_mm.data.features import FeatureWriter, Finished, read_feature, read_info, read_prompts
from mindspeed_mm.data.readahead import ReadAhead
from mindspeed_mm.data.sample import FeatureRecord, SampleRecord
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.files import format_json
from mindspeed_mm.log import get_logger

logger = get_logger(__name__)
DEFAULT_BATCH = 3  # clips of a sample per VAE pass: the video, inactive and reactive


@dataclass(frozen=True)
class Failed:
    """A row that could not be used."""

    record: SampleRecord
    reason: str


@dataclass
class Seconds:
    """Seconds that the encoding process spent in each stage."""

    read: float = 0.0  # waiting for pixels
    vae: float = 0.0
    text: float = 0.0
    write: float = 0.0  # waiting for earlier files to be written

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Add the run time of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)


@dataclass
class Extraction:
    """One rank's share of an extraction. `run` yields each completed row once, as Finished or Failed."""

    vae: StreamEncoder
    text: PromptCache
    keys: FeatureKeys
    load: Callable[[SampleRecord], PixelSample]
    save_path: Path
    num_workers: int = 2
    timeout: float = 600.0
    rank: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    # Processes to read with. None = `run` starts its own.
    readers: ReadAhead[ReadTask, ReadResult] | None = None
    _prompt_index: PartIndex | None = None  # maps captions to a feature with their embeddings
    _damaged: set[Path] = field(default_factory=set)  # features that this run could not reuse

    def read_ahead(self) -> ReadAhead[ReadTask, ReadResult]:
        """Return a context manager for processes that read this dataset. They start on the first task."""
        read = ReadRow(self.load, self.keys, self.save_path / FEATURE_FOLDER)
        return ReadAhead(read, num_workers=self.num_workers, timeout=self.timeout)

    def run(
        self, records: Sequence[SampleRecord], stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Finished | Failed]:
        """Encode the rows that have no feature.

        Once `stop` returns true, the current row is finished, and the others are left for the next run.
        """
        index = ContentIndex(self.save_path / STATE_FOLDER, self.rank)
        latents = PartIndex(self.save_path / STATE_FOLDER, "latents", self.rank)
        self._prompt_index = PartIndex(self.save_path / STATE_FOLDER, "prompts", self.rank)
        existing_tasks: dict[Path, ReadTask] = {}
        missing: list[ReadTask] = []
        new_captions: list[tuple[SampleRecord, str, Path]] = []
        for record in records:
            task = self._task(record, index)
            existing = self._find_existing(task, latents)
            shared = None if existing else self._find_shared_latents(task, latents)
            if existing is not None:
                existing_tasks[self._path(existing.key)] = task
                yield existing
            elif shared is not None:
                new_captions.append((record, *shared))
            else:
                missing.append(task)
        readers = self.read_ahead() if self.readers is None else nullcontext(self.readers)
        with readers as ahead, FeatureWriter() as writer:
            for record, key, source in new_captions:
                if stop():
                    break
                if self._reencode_prompts(record, key, source, writer):
                    yield from writer.finished()
                else:
                    missing.append(self._task(record, index))
            yield from self._encode_all(ahead, missing, index, latents, writer, stop)
            again = [
                replace(existing_tasks[path], redo=True) for path in self._damaged if path in existing_tasks
            ]
            for outcome in self._encode_all(ahead, again, index, latents, writer, stop):
                if isinstance(outcome, Failed):  # a Finished row was already yielded above
                    yield outcome

    def _encode_all(
        self,
        ahead: ReadAhead[ReadTask, ReadResult],
        tasks: Sequence[ReadTask],
        index: ContentIndex,
        latents: PartIndex,
        writer: FeatureWriter,
        stop: Callable[[], bool],
    ) -> Iterator[Finished | Failed]:
        """Encode the rows, and yield each one once its file is written."""
        rows = iter(ahead.map(tasks))
        while not stop():
            with self.seconds.during("read"):
                row = next(rows, None)
            if row is None:
                break
            outcome = self._row(*row, index, latents, writer)
            yield from writer.finished()
            if outcome is not None:
                yield outcome
        with self.seconds.during("write"):
            yield from writer.finished(wait=True)

    def _task(self, record: SampleRecord, index: ContentIndex) -> ReadTask:
        cached = {path: index.get(path) for _, path in record.files}
        known = {path: digest for path, digest in cached.items() if digest is not None}
        return ReadTask(record, known, is_known=len(known) == len(cached))

    def _find_existing(self, task: ReadTask, latents: PartIndex) -> Finished | None:
        """Return the row as Finished if its files have not changed and its feature exists, else None.

        Opens only the feature file.
        """
        if not task.is_known:
            return None
        key = self.keys.key(task.record, task.known)
        info = stored_info(self._path(key))
        if info is None:
            return None
        shared = self.keys.latents_key(task.record, task.known)
        if latents.get(shared) is None:
            latents.add(shared, key)
        if (
            self._prompt_index is not None
            and self._prompt_index.get(self.keys.prompts_key(task.record)) is None
        ):
            self._prompt_index.add(self.keys.prompts_key(task.record), key)
        return Finished(task.record, key, info.shape, info.num_refs, fresh=False)

    def _find_shared_latents(self, task: ReadTask, latents: PartIndex) -> tuple[str, Path] | None:
        """Return the row's new key, and the path of a feature with equal latents but different text."""
        if not task.is_known:
            return None
        other = latents.get(self.keys.latents_key(task.record, task.known))
        if other is None or self._path(other) in self._damaged or stored_info(self._path(other)) is None:
            return None
        return self.keys.key(task.record, task.known), self._path(other)

    def _reencode_prompts(self, record: SampleRecord, key: str, source: Path, writer: FeatureWriter) -> bool:
        """Write a feature from stored latents if only the captions or the text encoder changed.

        The latents are copied bit for bit, and only the text is encoded. Returns False if the stored feature
        is damaged.
        """
        try:
            info, feature = read_info(source), read_feature(source)
        except DataError as error:
            self._mark_damaged(source, error)
            return False
        with _watchdog(record, self.timeout), self.seconds.during("text"):
            prompts = self._prompts(record, key)
        metadata = {**info.metadata, **self.metadata, **_origin(record)}
        done = Finished(record, key, info.shape, info.num_refs, fresh=True)
        with self.seconds.during("write"):
            writer.write(self._path(key), replace(feature, prompt_embeds=prompts, key=key), metadata, done)
        return True

    def _mark_damaged(self, path: Path, error: DataError) -> None:
        if path not in self._damaged:
            self._damaged.add(path)
            logger.warning(f"{error}; ignoring this feature and encoding the rows that use it again")

    def _prompts(self, record: SampleRecord, key: str) -> tuple[Tensor, ...]:
        """Return the prompt embeddings, reused from a feature with other settings if there is one.

        A changed frame count or size therefore does not run the text encoder again.
        """
        if self._prompt_index is None:
            return self.text.encode(record.captions)
        shared = self.keys.prompts_key(record)
        earlier = self._prompt_index.get(shared)
        self._prompt_index.add(shared, key)
        if earlier is not None and stored_info(self._path(earlier)) is not None:
            try:
                prompts = read_prompts(self._path(earlier))
            except DataError as error:
                self._mark_damaged(self._path(earlier), error)
            else:
                if len(prompts) == len(record.captions):
                    return prompts
        return self.text.encode(record.captions)

    def _path(self, key: str) -> Path:
        return self.save_path / FEATURE_FOLDER / f"{key}.safetensors"

    def _row(
        self,
        task: ReadTask,
        read: ReadResult | DataError,
        index: ContentIndex,
        latents: PartIndex,
        writer: FeatureWriter,
    ) -> Finished | Failed | None:
        if isinstance(read, DataError):
            return Failed(task.record, _with_address(task.record, str(read)))
        index.add(read.contents)
        # Safe to add before the feature is written, because readers check that the target exists.
        latents.add(read.latents_key, read.key)
        path = self._path(read.key)
        if read.pixels is None or writer.is_pending(path):
            with self.seconds.during("write"):
                writer.wait_for(path)
            info = read_info(path)
            return Finished(task.record, read.key, info.shape, info.num_refs, fresh=False)
        with _watchdog(task.record, self.timeout):
            try:
                feature = self._encode(task.record, read.key, read.pixels)
            except DataError as error:
                return Failed(task.record, _with_address(task.record, str(error)))
        shape = (feature.latents.shape[1], feature.latents.shape[2], feature.latents.shape[3])
        done = Finished(task.record, read.key, shape, feature.num_refs, fresh=True)
        with self.seconds.during("write"):
            writer.write(path, feature, self._metadata(task.record, read.pixels), done)
        return None

    def _encode(self, record: SampleRecord, key: str, pixels: PixelSample) -> FeatureRecord:
        with self.seconds.during("vae"):
            try:
                latents, context = encode_features(self.vae, to_sample(pixels))
                latents, context = latents.to("cpu", torch.bfloat16), context.to("cpu", torch.bfloat16)
            except torch.OutOfMemoryError as error:
                size = "x".join(map(str, pixels.video.shape[:3]))
                reason = str(error).splitlines()[0]
                raise MindSpeedMMError(
                    f"out of device memory while encoding {size} (frames x height x width): {reason}",
                    where=record.address,
                    fix="set ae.enable_tiling in the model JSON, or lower max_hxw or num_frames",
                ) from None
        with self.seconds.during("text"):
            prompts = self._prompts(record, key)
        return FeatureRecord(
            latents=latents,
            vace_context=context,
            prompt_embeds=prompts,
            num_refs=len(pixels.src_ref_images),
            key=key,
        )

    def _metadata(self, record: SampleRecord, pixels: PixelSample) -> dict[str, str]:
        frames, height, width = pixels.video.shape[:3]
        return {
            **self.metadata,
            "frames": str(frames),
            "height": str(height),
            "width": str(width),
            "fps": f"{pixels.fps:g}",
            "frame_policy": pixels.frame_policy,
            "frame_indices": json.dumps(pixels.frame_indices),
            **_origin(record),
        }


def _origin(record: SampleRecord) -> dict[str, str]:
    """Return the part of the row's metadata that does not depend on its pixels."""
    synthesis = record.synthesis
    task = {} if synthesis is None else {"task": synthesis.task, "task_options": synthesis.options}
    return {
        **task,
        "captions": format_json(record.captions),
        "source": str(record.video),
        "address": record.address,
    }


def _with_address(record: SampleRecord, reason: str) -> str:
    return (
        reason if not record.address or reason.startswith(record.address) else f"{record.address}: {reason}"
    )


@contextmanager
def _watchdog(record: SampleRecord, timeout: float) -> Iterator[None]:
    """End the process if the block takes longer than `timeout` seconds, because the device may be hung.

    A new run resumes at this row.
    """

    def give_up() -> None:
        logger.error(
            f"{record.address}: encoding did not finish within {timeout:g} s (--sample-timeout); stopping. "
            "Run the command again to resume"
        )
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
