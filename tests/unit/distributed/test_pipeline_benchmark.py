"""benchmarks/pipeline.py: a replayed step waits as the formula says where all stages cost the same."""

import importlib
import sys
from pathlib import Path

import pytest

from mindspeed_mm.distributed.config import bubble

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("pipeline")
    sys.modules.pop("pipeline")


@pytest.mark.parametrize("batches", [2, 4, 8])
def test_two_even_stages_wait_as_the_formula_says(bench, batches):
    """1F1B by hand: the first stage is one forward ahead."""

    def forward(stage, batch):
        return bench.Work(True, stage, batch, 1.0)

    def backward(stage, batch):
        return bench.Work(False, stage, batch, 2.0)

    first = [forward(0, 0)]
    for batch in range(1, batches):
        first += [forward(0, batch), backward(0, batch - 1)]
    first.append(backward(0, batches - 1))
    last = [work for batch in range(batches) for work in (forward(1, batch), backward(1, batch))]
    length, share = bench.replay([first, last])
    assert length == 3 * batches + 3
    assert share == pytest.approx(bubble(2, 1, batches))
