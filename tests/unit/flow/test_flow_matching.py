"""Noise, target and loss of a training sample."""

import torch

from mindspeed_mm.flow.config import ScheduleConfig
from mindspeed_mm.flow.matching import (
    FlowSample,
    keyed_generator,
    sample_flow,
    sample_flow_at,
    sample_losses,
)
from mindspeed_mm.flow.schedule import build_schedule

SCHEDULE = build_schedule(ScheduleConfig())


def latents(rows: int) -> torch.Tensor:
    return torch.randn(rows, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def draw(indices: list[int], seed: int = 1) -> FlowSample:
    return sample_flow(latents(1).expand(len(indices), -1, -1, -1, -1), SCHEDULE, torch.tensor(indices), seed)


def test_noisy_latents_are_between_clip_and_noise():
    clean = latents(2)
    sample = sample_flow(clean, SCHEDULE, torch.tensor([3, 4]), seed=1)
    sigma = (sample.timestep / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(sample.noisy, clean + sigma * sample.target)


def test_draws_depend_only_on_seed_and_sample_index():
    together, apart = draw([10, 11]), draw([11])
    assert torch.equal(together.target[1], apart.target[0])
    assert torch.equal(together.timestep[1:], apart.timestep)
    assert not torch.equal(draw([11], seed=2).target, apart.target)


def test_every_sample_has_its_own_timestep_and_noise():
    sample = draw(list(range(16)))
    assert len(set(sample.timestep.tolist())) > 12
    assert not torch.equal(sample.target[0], sample.target[1])


def test_indices_are_uniform_over_the_experts_range():
    schedule = build_schedule(ScheduleConfig(expert="high"))
    tiny = torch.zeros(1, 1, 1, 1, 1).expand(4000, -1, -1, -1, -1)
    timesteps = sample_flow(tiny, schedule, torch.arange(4000), seed=0).timestep
    assert timesteps.min() >= 875
    places = torch.searchsorted(-schedule.sigmas, -timesteps / 1000 + 1e-7).clamp(0, 416)
    counts = torch.histc(places.float(), bins=4, min=0, max=417)
    assert (counts - 1000).abs().max() < 120  # 4 standard deviations of a fair draw


def test_noise_is_standard_normal():
    sample = sample_flow(torch.zeros(1, 16, 8, 16, 16), SCHEDULE, torch.tensor([0]), seed=5)
    assert abs(float(sample.target.mean())) < 0.03
    assert abs(float(sample.target.std()) - 1) < 0.03


def test_bf16_latents_are_noised_in_fp32_and_left_alone():
    clean = latents(1).bfloat16()
    before = clean.clone()
    sample = sample_flow(clean, SCHEDULE, torch.tensor([0]), seed=0)
    assert {sample.noisy.dtype, sample.target.dtype, sample.timestep.dtype, sample.weight.dtype} == {
        torch.float32
    }
    assert torch.equal(clean, before)


def test_losses_are_the_mean_squared_error_of_each_row():
    sample = draw([1, 2])
    velocity = torch.zeros_like(sample.target)
    by_hand = [float((row**2).mean()) for row in sample.target]
    torch.testing.assert_close(sample_losses(velocity, sample), torch.tensor(by_hand))


def test_reference_frames_can_be_left_out_of_the_loss():
    sample = draw([1])
    velocity = sample.target.clone()
    velocity[:, :, 0] += 1
    assert float(sample_losses(velocity, sample, num_refs=1)) == 0
    torch.testing.assert_close(sample_losses(velocity, sample), torch.tensor([1 / 3]))


def test_held_out_noise_is_fixed_per_clip():
    clean = latents(1)
    first, again = (sample_flow_at(clean, SCHEDULE, place, torch.tensor([4]), seed=1) for place in (100, 900))
    torch.testing.assert_close(first.target, again.target)
    assert not torch.equal(first.target, sample_flow(clean, SCHEDULE, torch.tensor([4]), seed=1).target)
    assert float(first.timestep) == float(SCHEDULE.timesteps[100])


def test_keyed_generator_is_the_same_in_every_process():
    drawn = torch.randn(3, generator=keyed_generator(1234, 56))
    torch.testing.assert_close(drawn, torch.randn(3, generator=keyed_generator(1234, 56)))
    assert not torch.equal(drawn, torch.randn(3, generator=keyed_generator(1234, 57)))
    assert not torch.equal(drawn, torch.randn(3, generator=keyed_generator(1234, 56, "other")))
