"""The schedule that training draws from, against closed formulas."""

import json

import pytest
import torch

from mindspeed_mm.config.schema import parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.flow.schedule import build_schedule, shifted, training_sigmas
from tests.support.errors import raises


def test_timesteps_are_distinct_and_fall_from_1000():
    timesteps = build_schedule(ScheduleConfig()).timesteps
    assert timesteps.dtype == torch.float32
    assert len(set(timesteps.tolist())) == 1000
    assert timesteps[0] == 1000
    assert (timesteps.diff() < 0).all()


def test_sigmas_are_the_shifted_grid():
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    torch.testing.assert_close(training_sigmas(ScheduleConfig()), (5 * u / (1 + 4 * u)).float())
    torch.testing.assert_close(training_sigmas(ScheduleConfig(shift=3)), shifted(u, 3.0).float())
    without_step = training_sigmas(ScheduleConfig(extra_one_step=False, sigma_min=0.1, shift=1))
    torch.testing.assert_close(without_step, torch.linspace(1, 0.1, 1000))


def test_bell_weights_have_mean_one_and_peak_at_833():
    schedule = build_schedule(ScheduleConfig())
    t = schedule.timesteps.double()
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = (y - y.min()) * 1000 / (y - y.min()).sum()
    torch.testing.assert_close(schedule.weights.double(), expected, atol=1e-6, rtol=1e-6)
    assert schedule.weights.mean() == pytest.approx(1, abs=1e-6)
    assert schedule.weights.max() == pytest.approx(2.0764, abs=5e-5)
    assert schedule.weights.argmax() == 833
    assert schedule.weights[0] == 0


def test_bell_never_draws_timestep_1000():
    assert build_schedule(ScheduleConfig()).indices.tolist() == list(range(1, 1000))
    assert build_schedule(ScheduleConfig(loss_weighting="none")).indices.tolist() == list(range(1000))


def test_no_weighting_weighs_everything_one():
    assert (build_schedule(ScheduleConfig(loss_weighting="none")).weights == 1).all()


def test_one_boundary_parts_the_experts_without_gap_or_overlap():
    high, low = ScheduleConfig(expert="high"), ScheduleConfig(expert="low")
    assert (high.indices, low.indices) == (range(0, 417), range(417, 1000))
    sigmas = training_sigmas(high)
    assert sigmas[416] >= 0.875 > sigmas[417]


@pytest.mark.parametrize(("expert", "mean"), [("high", 0.342), ("low", 1.470)])
def test_bell_underweights_the_high_expert_unless_normalized(expert, mean):
    config = ScheduleConfig(expert=expert)
    span = slice(config.indices.start, config.indices.stop)
    assert build_schedule(config).weights[span].mean() == pytest.approx(mean, abs=5e-4)
    normalized = build_schedule(ScheduleConfig(expert=expert, normalize_per_expert=True))
    assert normalized.weights[span].mean() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "expert", "places"),
    [(0.0, 0.358, "high", range(0, 417)), (0.358, 1, "low", range(417, 1000))],
)
def test_published_boundaries_select_the_expert(low, high, expert, places):
    config = ScheduleConfig(min_timestep_boundary=low, max_timestep_boundary=high)
    assert (config.role, config.indices) == (expert, places)
    note = config.boundary_note()
    assert note is not None
    assert "sigma 0.900" in note
    assert "59 indices" in note


def test_boundaries_that_agree_are_not_reported():
    assert ScheduleConfig(min_timestep_boundary=0.0, max_timestep_boundary=0.417).boundary_note() is None
    assert (
        ScheduleConfig(min_timestep_boundary=0.0, max_timestep_boundary=0.358, boundary=0.9).boundary_note()
        is None
    )


def test_middle_range_of_the_older_keys_is_kept_as_it_is():
    assert ScheduleConfig(min_timestep_boundary=0.2, max_timestep_boundary=0.6).indices == range(200, 600)


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"shfit": 5}, ["m.json:shfit", "shift"]),
        ({"expert": "low", "min_timestep_boundary": 0.0, "max_timestep_boundary": 0.358}, ["high"]),
        ({"min_timestep_boundary": 0.7, "max_timestep_boundary": 0.6}, ["min_timestep_boundary", "0.7"]),
        ({"boundary": 1.5}, ["m.json:boundary", "1.5"]),
    ],
)
def test_bad_diffusion_part_is_one_line_with_its_address(values, facts):
    with raises(ConfigError, *facts):
        parse(ScheduleConfig, json.loads(json.dumps(values)), "m.json")
