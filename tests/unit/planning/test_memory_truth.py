"""The planner's formula against torch's FSDPMemTracker.

Our model under FakeTensorMode, a fake process group, no memory filled.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.fake_memory import peak
from tests.support.planned import Case

pytestmark = pytest.mark.medium

CASES = [
    pytest.param(Case("mid", "full", "branch", shards=4), id="full"),
    pytest.param(Case("14B", "none", "branch", shards=8, cp=4), id="none, cp"),
    pytest.param(Case("14B", "full", "branch", shards=4, lora=32, quantize=True), id="int8"),
    *(
        pytest.param(case, id=str(case), marks=pytest.mark.slow)
        for case in (
            Case("1.3B", "selective", "branch"),
            Case("14B", "full", "trunk", shards=64, cp=8),
            Case("1.3B", "none", "trunk", shards=8),
            Case("1.3B", "full", "all", shards=8),
            Case("mid", "none", "all", shards=64, cp=2),
            Case("mid", "selective", "branch", shards=2, cp=8),
            Case("14B", "selective", "all", shards=16, cp=2, lora=16),
            Case("mid", "full", "branch", shards=4, lora=32),
        )
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_planned_memory_matches_torchs_tracker(case: Case) -> None:
    """Where the trunk trains the tracker counts up to 16 D bytes a token more than real ranks allocate."""
    assert case.planned().total == pytest.approx(peak(case.traced)["Total"], rel=0.1)


@pytest.mark.slow
def test_two_shallow_traces_predict_the_deep_plan() -> None:
    """Memory is linear in depth: the line through depths 2 and 3 meets the plan of all 15 branch blocks."""
    case = Case("1.3B", "full", "branch", shards=8, depth=2)
    first, second = peak(case.traced)["Total"], peak(replace(case, depth=3).traced)["Total"]

    deep = replace(case, depth=15).planned().total
    assert deep == pytest.approx(second + 12 * (second - first), rel=0.1)
