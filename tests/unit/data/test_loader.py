"""Which samples make which micro-batch."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm import processes
from mindspeed_mm.data.config import LoaderConfig
from mindspeed_mm.data.loader import Collate, RankSampler, SampleOrder, TrainLoader
from mindspeed_mm.data.sample import Batch, FeatureRecord
from mindspeed_mm.errors import DataError
from tests.support.errors import raises
from tests.support.loops import random_records

SHAPES = ["wide"] * 5 + ["tall"] * 3 + ["square"]


def groups(order: SampleOrder, count: int) -> list[tuple[int, ...]]:
    return [order.group(index) for index in range(count)]


@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    micro=st.integers(1, 5),
    shuffle=st.booleans(),
    epochs=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_dropped_and_no_micro_batch_mixes_shapes(counts, micro, shuffle, epochs):
    shapes = [shape for shape, count in enumerate(counts) for _ in range(count)]
    order = SampleOrder(shapes, micro_batch_size=micro, seed=3, shuffle=shuffle)
    seen: Counter[int] = Counter()
    for epoch in range(epochs * micro):  # after micro epochs every stream ends on a cut
        for group in order.epoch(epoch):
            assert len(group) == micro
            assert len({shapes[record] for record in group}) == 1
            seen.update(group)
    assert seen == Counter(dict.fromkeys(range(len(shapes)), epochs * micro))


def test_order_is_a_function_of_seed_and_epoch_alone():
    straight = SampleOrder(SHAPES, micro_batch_size=2, seed=1)
    forward = groups(straight, 30)
    jumping = SampleOrder(SHAPES, micro_batch_size=2, seed=1)
    assert [jumping.group(index) for index in reversed(range(30))] == forward[::-1]
    assert groups(SampleOrder(SHAPES, micro_batch_size=2, seed=2), 30) != forward


def test_epochs_differ_only_when_shuffled():
    shuffled = SampleOrder(["one"] * 20, micro_batch_size=1, seed=1)
    assert shuffled.epoch(0) != shuffled.epoch(1)
    plain = SampleOrder(["one"] * 4, micro_batch_size=1, seed=1, shuffle=False)
    assert groups(plain, 8) == [(0,), (1,), (2,), (3,)] * 2


def test_ranks_share_one_row_of_groups_whatever_their_number():
    order = SampleOrder(SHAPES, micro_batch_size=1, seed=1)

    def iteration(dp_size: int, consumed: int) -> list[tuple[int, int]]:
        samplers = [
            iter(RankSampler(order, dp_rank=r, dp_size=dp_size, consumed_samples=consumed))
            for r in range(dp_size)
        ]
        draws = [draw for sampler in samplers for _ in range(4 // dp_size) for draw in next(sampler)]
        return sorted(tuple(draw) for draw in draws)

    for consumed in (0, 4, 8):
        assert iteration(1, consumed) == iteration(2, consumed) == iteration(4, consumed)
        assert [index for _, index in sorted(iteration(1, consumed), key=lambda draw: draw[1])] == list(
            range(consumed, consumed + 4)
        )


def test_sampler_resumes_where_the_consumed_samples_say():
    order = SampleOrder(SHAPES, micro_batch_size=2, seed=1)
    whole, rest = iter(RankSampler(order, dp_rank=0, dp_size=1)), None
    first = [next(whole) for _ in range(9)]
    rest = iter(RankSampler(order, dp_rank=0, dp_size=1, consumed_samples=8))
    assert [next(rest) for _ in range(5)] == first[4:]


def test_resume_position_must_divide_by_micro_batch():
    order = SampleOrder(SHAPES, micro_batch_size=2, seed=1)
    with raises(DataError, 3, 2):
        RankSampler(order, dp_rank=0, dp_size=1, consumed_samples=3)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_far_group_is_found_immediately(micro):
    order = SampleOrder([0] * 3 + [1], micro_batch_size=micro, seed=1)
    near = [group for epoch in range(12) for group in order.epoch(epoch)]
    assert [order.group(index) for index in range(len(near))] == near
    assert [order.group(index) for index in reversed(range(len(near)))] == near[::-1]
    assert len(order.group(2**50)) == micro  # a walk through the epochs would not come back


def test_empty_dataset_is_an_error():
    with raises(DataError, "empty"):
        SampleOrder([], micro_batch_size=1, seed=0)


def test_prompts_are_padded_with_zeros():
    records = random_records(2, captions=2)
    short, long = records[0].prompt_embeds[0], records[1].prompt_embeds[1]
    chosen = [
        FeatureRecord(**{**vars(records[0]), "prompt_embeds": (short,)}),
        FeatureRecord(**{**vars(records[1]), "prompt_embeds": (long,)}),
    ]
    batch = Collate(seed=0).stack([(chosen[0], 7), (chosen[1], 9)])
    assert batch.prompt_embeds.shape[:2] == (2, 6)
    assert batch.prompt_lengths.tolist() == [5, 6]
    assert (batch.prompt_embeds[0, 5] == 0).all()
    assert batch.sample_index.tolist() == [7, 9]
    assert batch.keys == ("clip0", "clip1")


def test_caption_is_chosen_by_seed_and_sample_index():
    record = random_records(1, captions=3)[0]
    lengths = [len(Collate(seed=1).prompt(record, index)) for index in range(300)]
    assert lengths == [len(Collate(seed=1).prompt(record, index)) for index in range(300)]
    assert set(Counter(lengths)) == {5, 6, 7}
    assert min(Counter(lengths).values()) > 70


def test_caption_dropout_uses_the_stored_null_prompt_at_its_rate():
    record, null = random_records(1)[0], torch.zeros(1, 32)
    collate = Collate(seed=1, caption_dropout=0.25, null_prompt=null)
    dropped = sum(collate.prompt(record, index) is null for index in range(2000))
    assert abs(dropped / 2000 - 0.25) < 0.04


def test_caption_dropout_without_a_null_prompt_says_what_to_do():
    with raises(DataError, "null_prompt.safetensors"):
        Collate(seed=1, caption_dropout=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same_batches_and_report_bad_files(workers):
    class Bad(type(random_records(0))):
        def shape(self, index):
            return (3, 4, 6)

        def __getitem__(self, index):
            if index == 2:
                raise DataError("features/abc.safetensors: cut short")
            return super().__getitem__(index)

    loader = TrainLoader(
        Bad(random_records(4)),
        LoaderConfig(shuffle=False),
        Collate(seed=0),
        micro_batch_size=1,
        seed=0,
        num_workers=workers,
    )
    batches = loader.batches()
    assert [next(batches).keys for _ in range(2)] == [("clip0",), ("clip1",)]
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == "features/abc.safetensors: cut short"


def test_batch_moves_as_a_whole():
    batch = Collate(seed=0).stack([(random_records(1)[0], 0)])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.keys == batch.keys


def test_batch_that_is_awaited_names_its_files():
    seen = []

    class Watched(type(random_records(0))):
        def path(self, index):
            return f"clip{index}.safetensors"

        def __getitem__(self, index):
            seen.extend(str(what) for what, _ in processes._STATE.reading.values())
            return super().__getitem__(index)

    source, config = Watched(random_records(4)), LoaderConfig(shuffle=False)
    batches = TrainLoader(source, config, Collate(seed=0), micro_batch_size=2, seed=0).batches()
    next(batches)
    next(batches)
    assert list(dict.fromkeys(seen)) == [
        "clip0.safetensors, clip1.safetensors",
        "clip2.safetensors, clip3.safetensors",
    ]
    assert not processes._STATE.reading
