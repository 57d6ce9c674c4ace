"""Sigmas and timesteps match the published samplers, and the schedulers use them."""

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from mindspeed_mm.generation.config import RequestConfig
from mindspeed_mm.generation.presets import resolve_sampling
from mindspeed_mm.generation.sampling_config import SamplingConfig
from mindspeed_mm.generation.solvers.config import SOLVERS, SolverSpec
from mindspeed_mm.generation.solvers.solver import Solver, sigma_table, timestep_table


def sampling(**values):
    return SamplingConfig(**values)


def test_euler_timesteps_of_fifty_steps_at_shift_five():
    timesteps = timestep_table(sampling(solver="euler", steps=50, shift=5))
    assert [round(float(t), 2) for t in (*timesteps[:3], *timesteps[-2:])] == [
        1000.0,
        995.93,
        991.74,
        172.41,
        92.59,
    ]


@pytest.mark.parametrize(
    ("solver", "grid", "base", "whole"),
    [
        ("euler", "official", np.linspace(1, 0, 31)[:-1], False),
        ("unipc", "official", np.linspace(0.999, 0, 31)[:-1], True),
        ("unipc", "diffusers", np.linspace(1, 0.001, 31)[:-1], True),
        ("dpm++", "official", np.linspace(1, 0, 31)[:30], True),
    ],
)
def test_tables_match_the_published_formulas(solver, grid, base, whole):
    settings = sampling(solver=solver, grid=grid, steps=30, shift=7.0)
    sigmas = 7 * base / (1 + 6 * base)
    if grid == "diffusers":
        sigmas[0] -= 1e-6
    timesteps = (1000 * sigmas).astype(int) if whole else 1000 * sigmas
    np.testing.assert_allclose(sigma_table(settings), [*sigmas, 0], atol=6e-8)
    np.testing.assert_allclose(timestep_table(settings), timesteps, rtol=1e-7)
    scheduler = Solver(settings)._stepper
    assert torch.equal(scheduler.sigmas, sigma_table(settings))  # and diffusers' scheduler stands on them
    assert torch.equal(scheduler.timesteps, timestep_table(settings))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.0])
def test_diffusers_grid_matches_diffusers(shift):
    oracle = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    oracle.set_timesteps(20)
    if float(oracle.sigmas[0]) < 0.99999:
        pytest.skip("this diffusers still has the official code's grid")
    ours = sampling(solver="unipc", grid="diffusers", steps=20, shift=shift)
    torch.testing.assert_close(sigma_table(ours), oracle.sigmas, atol=2e-7, rtol=0)
    assert timestep_table(ours).tolist() == oracle.timesteps.tolist()


@pytest.mark.parametrize(("steps", "high"), [(20, 13), (40, 26), (50, 32)])
def test_high_noise_expert_takes_its_published_share(steps, high):
    timesteps = timestep_table(resolve_sampling(RequestConfig(steps=steps), experts=2))
    assert int((timesteps >= 875).sum()) == high


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_straight_flow_is_followed_to_its_end(solver, steps):
    """When the velocity is that of one point, every solver arrives at the point, however few the steps."""
    settings = sampling(solver=solver, steps=steps, shift=5.0)
    solver_ = Solver(settings)
    generator = torch.Generator().manual_seed(0)
    point, noise = (torch.randn(1, 16, 2, 4, 4, generator=generator) for _ in range(2))
    first = float(solver_.sigmas[0])
    sample = (1 - first) * point + first * noise
    for index in range(len(solver_)):
        sample = solver_.step(noise - point, index, sample)
    torch.testing.assert_close(sample, point, atol=2e-4, rtol=0)


def test_sigmas_fall_strictly_to_zero():
    for solver in ("unipc", "dpm++", "euler"):
        sigmas = sigma_table(sampling(solver=solver, steps=40))
        assert bool((sigmas[1:] < sigmas[:-1]).all())
        assert float(sigmas[-1]) == 0


@pytest.mark.parametrize(
    ("request_", "experts", "wanted"),
    [
        ({}, 1, ("unipc", "official", 16.0, 50)),
        ({}, 2, ("unipc", "official", 12.0, 50)),
        ({"preset": "diffsynth"}, 1, ("euler", "official", 5.0, 50)),
        ({"preset": "diffusers"}, 1, ("unipc", "diffusers", 3.0, 50)),
        ({"preset": "diffusers", "height": 720, "width": 1280}, 1, ("unipc", "diffusers", 5.0, 50)),
        (
            {"preset": "diffsynth", "solver": "dpm++", "shift": 9.0, "steps": 20},
            1,
            ("dpm++", "official", 9.0, 20),
        ),
    ],
)
def test_presets_fill_what_is_not_said(request_, experts, wanted):
    found = resolve_sampling(RequestConfig(**request_), experts=experts)
    assert (found.solver, found.grid, found.shift, found.steps) == wanted


def test_second_guidance_is_the_first_unless_set():
    assert resolve_sampling(RequestConfig(guidance_scale=3.0), experts=2).guidance_scale_2 == 3.0
    assert (
        resolve_sampling(RequestConfig(guidance_scale=3.0, guidance_scale_2=1.0), experts=2).guidance_scale_2
        == 1.0
    )


SHIFTS = [1.0, 3.0, 5.0, 8.0, 12.0, 16.0]


def whole_timesteps(start, end, shift, steps):
    """The closed formula of the official code: numpy's grid, shifted, times 1000, rounded down."""
    u = np.linspace(start, end, steps + 1)[:-1]
    return (shift * u / (1 + (shift - 1) * u) * 1000).astype(np.int64).tolist()


@pytest.mark.parametrize("shift", SHIFTS)
def test_whole_timesteps_equal_the_official_formula(shift):
    for steps in range(1, 101):
        dpm = timestep_table(sampling(solver="dpm++", steps=steps, shift=shift)).tolist()
        assert dpm == whole_timesteps(1, 0, shift, steps), steps
        unipc = timestep_table(sampling(solver="unipc", steps=steps, shift=shift)).tolist()
        assert unipc == whole_timesteps(float(np.float32(0.999)), 0, shift, steps), steps


@pytest.mark.parametrize("shift", SHIFTS)
def test_whole_timesteps_equal_those_of_installed_diffusers(shift):
    oracle = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    oracle.set_timesteps(20)
    if float(oracle.sigmas[0]) < 0.99999:
        pytest.skip("this diffusers still has the official code's grid")
    for steps in range(1, 101):
        oracle.set_timesteps(steps)
        settings = sampling(solver="unipc", grid="diffusers", steps=steps, shift=shift)
        assert timestep_table(settings).tolist() == oracle.timesteps.tolist(), steps
        assert torch.equal(sigma_table(settings), oracle.sigmas), steps


def test_dpm_reaches_400_where_torch_grids_gave_399():
    assert timestep_table(sampling(solver="dpm++", steps=50, shift=16))[48] == 400


def test_euler_and_training_tables_keep_their_bits():
    u = torch.linspace(1, 0, 51, dtype=torch.float64)[:-1]
    expected = torch.cat((5 * u / (1 + 4 * u), torch.zeros(1, dtype=torch.float64))).float()
    assert torch.equal(sigma_table(sampling(solver="euler", steps=50, shift=5)), expected)


def test_solvers_keep_their_order_in_help_and_api():
    names = ["unipc", "dpm++", "euler", "renoise"]
    assert list(SOLVERS.names())[:4] == names
    assert RequestConfig.model_json_schema()["properties"]["solver"]["enum"][:4] == names


def test_timesteps_go_to_any_solver_that_takes_them(monkeypatch):
    heun = SolverSpec(build="mindspeed_mm.generation.solvers.euler:build", free_timesteps=True)
    monkeypatch.setitem(SOLVERS._entries, "heun", heun)
    found = resolve_sampling(RequestConfig(solver="heun", timesteps=(900, 400)), experts=1)
    assert (found.solver, found.steps) == ("heun", 2)
    assert Solver(found).timesteps.tolist() == [900, 400]
