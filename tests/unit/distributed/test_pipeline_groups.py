"""Which micro-batches a pipeline's schedule runs together."""

import pytest

from mindspeed_mm.distributed.pipeline import group_positions


@pytest.mark.parametrize(
    ("shapes", "rounds", "groups"),
    [
        ([[1, 1, 1, 1]], 1, [[0, 1, 2, 3]]),
        ([[1, 1, 2, 2]], 1, [[0, 1], [2, 3]]),
        # a rank with one shape follows a rank with two
        ([[1, 1, 1, 1], [1, 2, 2, 2]], 1, [[0], [1, 2, 3]]),
        # interleaved stages take whole rounds
        ([[1] * 5], 2, [[0, 1, 2, 3], [4]]),
        ([[1]], 2, [[0]]),
    ],
)
def test_micro_batches_of_one_shape_on_every_rank_are_a_group(shapes, rounds, groups):
    assert list(group_positions(shapes, rounds)) == groups
