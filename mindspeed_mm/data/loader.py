"""Groups samples into micro-batches and reads them ahead.

The order of samples is a pure function of (seed, epoch).
"""

from __future__ import annotations

import bisect
import random
from collections import deque
from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mindspeed_mm.data.config import LoaderConfig
from mindspeed_mm.data.sample import Batch, FeatureRecord
from mindspeed_mm.errors import DataError, MindSpeedMMError
from mindspeed_mm.processes import reading


class FeatureSource(Protocol):
    """Interface that the loader requires of a dataset."""

    def __len__(self) -> int: ...

    def shape(self, index: int, /) -> Hashable: ...

    def __getitem__(self, index: int, /) -> FeatureRecord: ...


class Draw(NamedTuple):
    """One sample of the stream: the index of its record, and its consumed-sample index."""

    record: int
    sample_index: int


class SampleOrder:
    """An endless sequence of groups, each of `micro_batch_size` samples of one shape.

    Samples of one shape form an endless stream, epoch after epoch. Each stream is cut into groups of equal
    size. Epoch e contains the groups that end within each stream's e-th pass. No sample is dropped: samples
    that do not fill a group begin the next epoch.
    """

    def __init__(
        self, shapes: Sequence[Hashable], *, micro_batch_size: int, seed: int, shuffle: bool = True
    ) -> None:
        if not shapes:
            raise DataError("the dataset is empty", expected="at least one sample")
        self.micro_batch_size, self.seed, self.shuffle = micro_batch_size, seed, shuffle
        self._streams: dict[Hashable, list[int]] = {}
        for record, shape in enumerate(shapes):
            self._streams.setdefault(shape, []).append(record)
        self._epochs: dict[int, list[tuple[int, ...]]] = {}
        self._epoch, self._first = 0, 0  # the most recent epoch, and the index of its first group

    def group(self, index: int) -> tuple[int, ...]:
        """Return the records of the group at `index` of the endless sequence."""
        if not self._first <= index < self._first + self.groups_in(self._epoch):
            records = sum(map(len, self._streams.values()))
            # An epoch that begins after the group.
            after = (index + len(self._streams)) * self.micro_batch_size // records + 2
            self._epoch = bisect.bisect_right(range(after), index, key=self._groups_before) - 1
            self._first = self._groups_before(self._epoch)
        return self.epoch(self._epoch)[index - self._first]

    def groups_in(self, epoch: int) -> int:
        """Return the number of groups in the epoch."""
        return sum(len(self._cuts(len(records), epoch)) for records in self._streams.values())

    def _groups_before(self, epoch: int) -> int:
        return sum(epoch * len(records) // self.micro_batch_size for records in self._streams.values())

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """Return all groups of one epoch, in order."""
        if epoch not in self._epochs:
            groups = [group for records in self._streams.values() for group in self._groups(records, epoch)]
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}/groups").shuffle(groups)
            else:
                groups.sort()
            self._epochs = {epoch: groups}
        return self._epochs[epoch]

    def _cuts(self, length: int, epoch: int) -> range:
        return range(epoch * length // self.micro_batch_size, (epoch + 1) * length // self.micro_batch_size)

    def _groups(self, records: list[int], epoch: int) -> Iterator[tuple[int, ...]]:
        passes: dict[int, list[int]] = {}
        for k in self._cuts(len(records), epoch):
            cuts = [
                divmod(k * self.micro_batch_size + row, len(records)) for row in range(self.micro_batch_size)
            ]
            for number, _ in cuts:
                if number not in passes:
                    passes[number] = self._pass(records, number)
            yield tuple(passes[number][place] for number, place in cuts)

    def _pass(self, records: list[int], number: int) -> list[int]:
        order = list(records)
        if self.shuffle:
            random.Random(f"{self.seed}/{number}/{records[0]}").shuffle(order)
        return order


class RankSampler(Sampler[list[Draw]]):
    """Yields the groups of one data-parallel rank from `consumed_samples` on.

    Groups are assigned to the ranks in turn, as in Megatron.
    """

    def __init__(self, order: SampleOrder, *, dp_rank: int, dp_size: int, consumed_samples: int = 0) -> None:
        if consumed_samples % order.micro_batch_size:
            raise DataError(
                f"{consumed_samples} consumed samples are not a multiple of the micro-batch size "
                f"{order.micro_batch_size}",
                fix="continue with a micro-batch size that divides them",
            )
        self.order, self.dp_rank, self.dp_size = order, dp_rank, dp_size
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[Draw]]:
        size = self.order.micro_batch_size
        index = self.consumed_samples // size + self.dp_rank
        while True:
            yield [Draw(record, index * size + row) for row, record in enumerate(self.order.group(index))]
            index += self.dp_size


class _Noted(Sampler[list[Draw]]):
    """A sampler that records the batches it yields."""

    def __init__(self, sampler: RankSampler, given: deque[list[Draw]]) -> None:
        self.sampler, self.given = sampler, given

    def __iter__(self) -> Iterator[list[Draw]]:
        for draws in self.sampler:
            self.given.append(draws)
            yield draws


class _Names:
    """The files of the pending batch. Their names are looked up only when printed."""

    def __init__(self, source: FeatureSource, requested: deque[list[Draw]]) -> None:
        self.source, self.requested = source, requested

    def __str__(self) -> str:
        draws = self.requested[0] if self.requested else []
        path = getattr(self.source, "path", None)  # datasets of other packages may lack it
        return (
            ", ".join(str(path(draw.record)) if path else f"record {draw.record}" for draw in draws)
            or "a batch"
        )


class _Keyed(Dataset[Any]):
    """The dataset, indexed by a Draw.

    The error of a bad file is returned as a value, because a worker process would wrap it in a traceback.
    """

    def __init__(self, source: FeatureSource) -> None:
        self.source = source

    def __getitem__(self, draw: Draw) -> tuple[FeatureRecord | MindSpeedMMError, int]:
        try:
            return self.source[draw.record], draw.sample_index
        except MindSpeedMMError as error:
            return error, draw.sample_index


class Collate:
    """Collates records of one shape into a Batch.

    Chooses each row's caption, or the null prompt, by (seed, consumed-sample index).
    """

    def __init__(
        self,
        *,
        seed: int,
        caption_dropout: float = 0.0,
        null_prompt: Tensor | None = None,
        with_context: bool = True,
    ) -> None:
        if caption_dropout and null_prompt is None:
            raise DataError(
                "caption_dropout needs the embedding of the empty prompt, null_prompt.safetensors",
                fix="extract the features again, or set caption_dropout to 0",
            )
        self.seed, self.caption_dropout, self.null_prompt = seed, caption_dropout, null_prompt
        self.with_context = with_context  # False for a trunk without a branch

    def __call__(
        self, drawn: Sequence[tuple[FeatureRecord | MindSpeedMMError, int]]
    ) -> Batch | MindSpeedMMError:
        for record, _ in drawn:
            if isinstance(record, MindSpeedMMError):
                return record
        return self.stack([(record, index) for record, index in drawn if isinstance(record, FeatureRecord)])

    def stack(self, rows: Sequence[tuple[FeatureRecord, int]]) -> Batch:
        """Stack rows of one shape. Prompts are padded with zero rows to the longest prompt."""
        prompts = [self.prompt(record, index) for record, index in rows]
        return Batch(
            latents=torch.stack([record.latents for record, _ in rows]),
            vace_context=torch.stack([record.vace_context for record, _ in rows])
            if self.with_context
            else None,
            prompt_embeds=torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            num_refs=rows[0][0].num_refs,
            sample_index=torch.tensor([index for _, index in rows]),
            keys=tuple(record.key for record, _ in rows),
            tasks=tuple(record.task for record, _ in rows),
        )

    def prompt(self, record: FeatureRecord, sample_index: int) -> Tensor:
        """Return the embedding [L, text_dim] of one of the record's captions, or the null prompt."""
        chosen = self.caption(len(record.prompt_embeds), sample_index)
        if chosen is None and self.null_prompt is not None:
            return self.null_prompt
        return record.prompt_embeds[chosen or 0]

    def caption(self, count: int, sample_index: int) -> int | None:
        """Choose one of `count` captions for a sample; None = the empty caption."""
        chance = random.Random(f"{self.seed}/{sample_index}/caption")
        dropped = chance.random() < self.caption_dropout and self.null_prompt is not None
        return None if dropped else chance.randrange(count)


class TrainLoader:
    """Endless loader of one rank's micro-batches. `consumed_samples` is its only state."""

    def __init__(
        self,
        source: FeatureSource,
        config: LoaderConfig,
        collate: Collate,
        *,
        micro_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        shapes = [source.shape(index) for index in range(len(source))]
        self.order = SampleOrder(shapes, micro_batch_size=micro_batch_size, seed=seed, shuffle=config.shuffle)
        self.source, self.config, self.collate = source, config, collate
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.num_workers, self.pin_memory = num_workers, pin_memory and config.pin_memory
        self.tasks: tuple[str, ...] = getattr(source, "tasks", ())  # tasks named by the records

    def batches(self, consumed_samples: int = 0) -> Generator[Batch, None, None]:
        """Yield micro-batches from `consumed_samples` on. Raises DataError that names an unreadable file."""
        sampler = RankSampler(
            self.order, dp_rank=self.dp_rank, dp_size=self.dp_size, consumed_samples=consumed_samples
        )
        requested: deque[list[Draw]] = deque()  # batches that were requested and have not arrived
        loader = DataLoader(
            _Keyed(self.source),
            batch_sampler=_Noted(sampler, requested),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=2 if self.num_workers else None,
            # Unused. Without it, the loader would advance torch's global generator and change dropout.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        while True:
            with reading(_Names(self.source, requested)):
                batch = next(batches)
            requested.popleft()
            if isinstance(batch, MindSpeedMMError):
                raise batch
            yield batch
