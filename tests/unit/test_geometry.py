"""Sizes of latents and tokens match the model card and the official code."""

import pytest

from mindspeed_mm.geometry import WAN


def test_token_counts_match_the_model_card():
    assert WAN.tokens(81, 480, 832) == 32760
    assert WAN.tokens(81, 720, 1280) == 75600
    assert WAN.tokens(81, 480, 832, num_refs=2) == 32760 + 2 * 30 * 52


def test_vace_context_has_96_channels():
    assert (WAN.channels, WAN.mask_channels, WAN.context_channels) == (16, 64, 96)


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (49, 13), (81, 21), (121, 31)])
def test_latent_frames_count_one_and_then_four_at_a_time(frames, latent):
    assert WAN.latent_frames(frames) == latent == (frames + 3) // 4
    assert WAN.video_frames(latent) == frames
    assert WAN.grid(frames, 480, 832, num_refs=1) == (latent + 1, 60, 104)


def test_only_4k_plus_1_frames_fit():
    assert [n for n in range(1, 14) if WAN.fits_frames(n)] == [1, 5, 9, 13]
    assert [WAN.trim_frames(n) for n in range(1, 11)] == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9]
    assert all(abs(WAN.nearest_frames(n) - n) <= 2 for n in range(1, 100))


def test_nearest_side_is_at_least_one_token():
    assert [WAN.nearest_side(n) for n in (1, 16, 23, 25, 830)] == [16, 16, 16, 32, 832]
