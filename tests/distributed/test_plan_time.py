"""The planner's seconds of a training step against measured ones, and the all-to-all that is calibrated."""

import importlib
import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from mindspeed_mm.planning import calibrate as module
from mindspeed_mm.planning.calibrate import calibrate, calibration_file, read_calibration
from tests.distributed.jobs import CPU

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = (  # hidden_size, ffn_dim, heads, latents: the smaller ones of benchmarks/plan_time.py, and near it
    (256, 1024, 4, (3, 16, 16)),
    (256, 1024, 4, (5, 24, 32)),
    (512, 2048, 8, (3, 16, 16)),
    (512, 2048, 8, (3, 24, 32)),
    (768, 3072, 6, (3, 16, 24)),
)


def compared():
    sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("plan_time").compare(SIZES, CPU, rounds=3)


@pytest.mark.slow
def test_planned_seconds_match_a_step(world):
    """CPU seconds of one thread; rates and steps in turns, the least of each: other programs are left out."""
    (found,) = world.run(1, compared)
    ratios = [predicted / measured for predicted, measured in found]
    assert ratios == pytest.approx([1.0] * len(SIZES), rel=0.15), found


RATES = dict.fromkeys(("half", "single", "attention_half", "attention_single", "bytes", "call"), 0.5)


def calibrated(cache, local):
    os.environ.update(XDG_CACHE_HOME=cache, LOCAL_WORLD_SIZE=str(local))
    with patch.object(module, "rates", lambda accelerator: dict(RATES)):
        found = calibrate(CPU)
    return found, calibration_file().is_file() and read_calibration("fp32")


@pytest.mark.parametrize(("local", "place"), [(2, "link"), (1, "network")])
def test_ranks_calibrate_their_all_to_all(world, tmp_path, local, place):
    """One machine of two ranks, and two of one rank each: all ranks agree, and plans use the rate."""
    answers = world.run(2, calibrated, str(tmp_path), local)
    (first, device), (second, _) = answers
    assert first == second
    assert first["ranks"] == 2
    assert 0 < first[place] < 1000
    assert getattr(device, place) == first[place]
    assert {"link", "network"} & first.keys() == {place}
