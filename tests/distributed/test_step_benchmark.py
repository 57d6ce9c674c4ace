"""benchmarks/train_step.py: what it compares, and how it chooses."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.jobs import CPU
from tests.support.tiny import TINY

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def losses(who):
    """Three steps of one side."""
    sys.path.insert(0, str(BENCHMARKS))
    trainers = importlib.import_module("step_trainers")
    case = trainers.Case(TINY, (3, 4, 6), 5, "fp32", "branch", "cpu")
    inputs = trainers.make_inputs(case, torch.Generator().manual_seed(0), CPU.device)
    if who in trainers.PEERS:
        trainer = trainers.peer_trainer(case, who, inputs, CPU)
    else:
        trainer = trainers.our_trainer(case, trainers.Variant(who, False), inputs, CPU)
    return [trainer.step() for _ in range(3)]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    modules = importlib.import_module("train_step"), importlib.import_module("step_trainers")
    yield modules
    for module in modules:
        sys.modules.pop(module.__name__)


def test_both_train_the_same_numbers(bench, world):
    """Three losses, two updates apart, of equal weights: else times would compare different work."""
    ours, theirs = (world.run(1, losses, who)[0] for who in ("none", "diffusers"))
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert len(set(theirs)) == 3


def test_variant_is_a_mode_or_the_patterns_of_the_yaml(bench):
    _, trainers = bench
    assert trainers.Variant("none", False).plan(TINY) == {}
    assert set(trainers.Variant("full", False).plan(TINY).values()) == {"full"}
    plan = trainers.Variant("blocks.{0-1,3}=selective,vace_blocks.{*}=full", True).plan(TINY)
    assert plan == {
        "blocks.0": "selective",
        "blocks.1": "selective",
        "blocks.3": "selective",
        "vace_blocks.0": "full",
        "vace_blocks.1": "full",
    }


def test_what_fits_must_fit_by_both_measures(bench):
    step, _ = bench

    def row(name, seconds, tensors, process):
        return step.Measured(name, seconds, tensors * 2**20, process * 2**20, 1.0, 10, 1.0, 1.0, 1.0)

    peer = row("diffusers", 3.0, 100, 200)
    lines = step._comparison([row("a", 1.0, 101, 100), row("b", 1.5, 90, 201), row("c", 2.0, 100, 200)], peer)
    assert lines[0].startswith("Fastest in the peer's memory: c: 1.50 ×")
    assert lines[1].startswith("Fastest in any memory: a: 3.00 ×")
    assert step._comparison([row("a", 1.0, 101, 100)], peer)[0].startswith("No variant fits")
