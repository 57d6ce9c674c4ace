"""The planner's formula against what real ranks allocate."""

from __future__ import annotations

import pytest

from mindspeed_mm.planning.memory import memory_of_ranks
from tests.support.planned import Case, measured_memory

GRID = (3, 24, 32)  # 576 tokens of 128 channels: what a step computes outweighs the weights
FAST = {"grid": GRID, "dtype": "fp32"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case("tiny", "full", "branch", depth=2, grid=GRID), id="1 rank"),
        pytest.param(Case("tiny", "selective", "trunk", depth=2, **FAST), id="1 rank, the trunk trains"),
        pytest.param(Case("tiny", "full", "all", shards=2, depth=2, **FAST), id="2 ranks"),
        pytest.param(Case("tiny", "none", "branch", shards=2, cp=2, depth=2, **FAST), id="2 ranks, cp 2"),
        pytest.param(Case("tiny", "full", "branch", shards=2, lora=16, depth=2, **FAST), id="2 ranks, LoRA"),
        pytest.param(
            Case("tiny", "full", "branch", shards=2, lora=16, depth=2, grid=GRID, quantize=True),
            id="2 ranks, LoRA, int8",
        ),
        pytest.param(Case("tiny", "none", "all", shards=4, depth=2, **FAST), id="4 ranks"),
    ],
)
def test_planned_memory_matches_allocations_of_ranks(world, case):  # type: ignore[no-untyped-def]
    for measured in world.run(case.ranks, measured_memory, case):
        assert case.planned().total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case("tiny", "full", "branch", pp=2, micro=4, stages=(4, 4), depth=4, **FAST), id="2 stages"
        ),
        pytest.param(
            Case("tiny", "none", "all", pp=2, micro=3, stages=(2, 6), depth=4, **FAST),
            id="uneven, all train",
        ),
        pytest.param(
            Case("tiny", "selective", "branch", pp=2, micro=4, stages=(2, 2, 2, 2), depth=4, **FAST),
            id="virtual stages",
        ),
        pytest.param(
            Case("tiny", "full", "all", shards=2, pp=2, micro=3, stages=(4, 4), depth=4, **FAST),
            id="sharded stages",
        ),
    ],
)
def test_planned_memory_matches_allocations_of_stages(world, case):  # type: ignore[no-untyped-def]
    planned = [memory.total for memory in memory_of_ranks(case.run) for _ in range(case.run.replicas)]
    assert planned == pytest.approx(world.run(case.ranks, measured_memory, case), rel=0.1)
