"""The tiny world's VAE trainer: its network is diffusers', and what it writes is read as an official file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train_vae
from diffusers import AutoencoderKLWan

from mindspeed_mm.models.wan.vae import load_vae


@pytest.fixture
def vae() -> AutoencoderKLWan:
    return train_vae.new_vae(0).eval().requires_grad_(False)


def test_its_quick_layers_compute_what_diffusers_computes(vae: AutoencoderKLWan) -> None:
    torch.manual_seed(0)
    oracle = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval().requires_grad_(False)
    vae.load_state_dict(oracle.state_dict())  # where no layer does nothing, as some do at the start
    clip = train_vae.batch_of(0, 1, 9)
    latents = oracle.encode(clip).latent_dist.mean
    torch.testing.assert_close(vae.encode(clip).latent_dist.mean, latents, atol=5e-6, rtol=0)
    decoded = oracle.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(
        train_vae.decode_unclamped(vae, latents).clamp(-1, 1), decoded.clamp(-1, 1), atol=5e-6, rtol=0
    )


def test_initial_vae_encodes_the_last_of_four_frames(
    vae: AutoencoderKLWan,
) -> None:
    clip = train_vae.batch_of(0, 1, 9)
    latents = vae.encode(clip).latent_dist.mean
    assert latents.shape[2] == 3
    for frame in range(3):
        alone = vae.encode(clip[:, :, 4 * frame : 4 * frame + 1]).latent_dist.mean
        torch.testing.assert_close(latents[:, :, frame : frame + 1], alone)
    assert not torch.allclose(latents[:, :, 1], latents[:, :, 2])
    decoded = train_vae.decode_unclamped(vae, latents)
    for last in (4, 8):
        group = decoded[:, :, last - 3 : last]
        torch.testing.assert_close(group, decoded[:, :, last : last + 1].expand_as(group))


def test_at_the_start_colour_goes_through_to_the_latents(vae: AutoencoderKLWan) -> None:
    gray = torch.zeros(1, 3, 1, 64, 64)
    red = gray + torch.tensor([0.2, -0.1, -0.1]).view(1, 3, 1, 1, 1)  # as bright as gray
    latents = [vae.encode(clip).latent_dist.mean[..., 4, 4].flatten() for clip in (gray, red)]
    assert torch.dist(*latents) > 0.1 * latents[0].norm()


def test_vae_loss_equals_its_formula() -> None:
    error = torch.zeros(1, 3, 2, 1, 1)
    error[0, :, 0] = torch.tensor([0.6, 0.0, 0.0])[:, None, None]  # 0.4, -0.2, -0.2 without its mean
    error[0, :, 1] = 0.5  # of no colour
    phase = train_vae.Phase("", 1, 1, 1, 1.0, absolute=0.0, chroma=0.0)
    squared, absolute = (0.36 + 3 * 0.25) / 6, (0.6 + 3 * 0.5) / 6
    coloured, in_colour = (0.16 + 2 * 0.04) / 6, 0.8 / 6
    assert train_vae.pixel_loss(error, phase).item() == pytest.approx(2 * squared)
    assert train_vae.pixel_loss(error, replace(phase, absolute=3.0)).item() == pytest.approx(
        2 * squared + 3 * absolute
    )
    assert train_vae.pixel_loss(error, replace(phase, chroma=8.0)).item() == pytest.approx(
        2 * squared + 16 * coloured
    )
    both = train_vae.pixel_loss(error, replace(phase, absolute=1.0, chroma=1.0, first_frame=0.5)).item()
    first = 0.5 * (0.6 / 3 + 0.36 / 3)
    assert both == pytest.approx(2 * squared + absolute + 2 * coloured + in_colour + first)


def test_every_vae_phase_trains_its_part_and_loads(tmp_path: Path) -> None:
    vae = train_vae.new_vae(0)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    polish = train_vae.Phase(
        "denoiser", 5, 2, 1, 1e-3, decoder_only=True, bf16=False, noise=0.25, first_frame=0.15
    )
    train_vae.run_phase(vae, polish, 1, [1.0] * 16)
    moved = {
        name.split(".")[0]
        for name, weight in vae.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert moved == {"decoder", "post_quant_conv"}
    train_vae.run_phase(vae, train_vae.Phase("short clips", 5, 2, 1, 1e-3), 1, [1.0] * 16)
    moved = {
        name.split(".")[0]
        for name, weight in vae.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert moved == {"encoder", "quant_conv", "decoder", "post_quant_conv"}

    path = tmp_path / "Wan2.1_VAE.pth"
    statistics = train_vae.Statistics([0.5] * 16, [2.0] * 16)
    train_vae.save(vae, path, statistics, phases_done=2)
    again = train_vae.new_vae(1)
    assert train_vae.load(again, path) == (statistics, 2)
    clip = train_vae.batch_of(9, 1, 5)
    with torch.no_grad():
        latents = again.eval().encode(clip).latent_dist.mean
    torch.testing.assert_close(load_vae(path).encode(clip), (latents - 0.5) / 2, atol=1e-5, rtol=0)


def test_latent_noise_is_in_standard_deviations() -> None:
    def psnr(noise: float, std: float) -> float:
        phase = train_vae.Phase("denoiser", 1, 2, 1, 1e-3, decoder_only=True, bf16=False, noise=noise)
        return train_vae.run_phase(train_vae.new_vae(0), phase, 1, [std] * 16)

    clean = psnr(0.0, 9.0)
    assert psnr(1.0, 0.0) == clean
    assert psnr(1.0, 9.0) == psnr(9.0, 1.0) != clean


@pytest.mark.parametrize("weights", [{"absolute": 0.0}, {"chroma": 8.0}, {"first_frame": 0.5}])
def test_phase_trains_by_its_own_weights(weights: dict[str, float]) -> None:
    def decoder(phase: train_vae.Phase) -> torch.Tensor:
        vae = train_vae.new_vae(0)
        train_vae.run_phase(vae, phase, 1, [1.0] * 16)
        return torch.cat([weight.detach().flatten() for weight in vae.decoder.parameters()])

    phase = train_vae.Phase("denoiser", 5, 2, 1, 1e-3, decoder_only=True, bf16=False)
    assert torch.equal(decoder(phase), decoder(phase))
    assert not torch.equal(decoder(phase), decoder(replace(phase, **weights)))


def test_where_bf16_is_slow_a_phase_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def psnr(bf16: bool) -> float:
        return train_vae.run_phase(
            train_vae.new_vae(0), train_vae.Phase("frames", 1, 2, 1, 1e-3, bf16=bf16), 1, [1.0] * 16
        )

    monkeypatch.setattr(train_vae, "has_bf16", lambda device: False)
    assert psnr(bf16=True) == psnr(bf16=False)


def test_later_vae_phase_continues_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []

    def run_phase(
        vae: AutoencoderKLWan, phase: train_vae.Phase, scale: float, latents_std: list[float]
    ) -> float:
        seen.append((phase.name, latents_std[0]))
        return 0.0

    def measure_latents(vae: AutoencoderKLWan) -> train_vae.Statistics:
        return train_vae.Statistics([0.0] * 16, [10.0 * len(seen)] * 16)

    def main(phases: tuple[train_vae.Phase, ...]) -> train_vae.Statistics:
        monkeypatch.setattr(train_vae, "PHASES", phases)
        train_vae.main()
        statistics, done = train_vae.load(train_vae.new_vae(1), tmp_path / "vae.pth")
        assert done == len(phases)
        return statistics

    monkeypatch.setattr(train_vae, "run_phase", run_phase)
    monkeypatch.setattr(train_vae, "measure_latents", measure_latents)
    monkeypatch.setattr(train_vae, "measure_psnr", lambda vae: 30.0)
    monkeypatch.setattr(sys, "argv", ["train_vae.py", str(tmp_path / "vae.pth"), "--resume"])
    whole = train_vae.Phase("whole", frames=1, batch=2, steps=1, learning_rate=1e-3)
    polish = train_vae.Phase("polish", frames=1, batch=2, steps=1, learning_rate=1e-3, decoder_only=True)
    assert main((whole, polish)).std == [10.0] * 16
    assert main((whole, polish, replace(polish, name="again"))).std == [10.0] * 16
    assert seen == [("whole", 1.0), ("polish", 10.0), ("again", 10.0)]
