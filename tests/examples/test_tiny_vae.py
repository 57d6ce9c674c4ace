"""The tiny world's VAE trainer: its network is diffusers', and what it writes is read as an official file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_vae
from diffusers import AutoencoderKLWan

from mindspeed_mm.models.wan.vae import load_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return train_vae.new_vae(0).eval().requires_grad_(False)


def test_its_quick_norms_compute_what_diffusers_computes(vae: AutoencoderKLWan) -> None:
    torch.manual_seed(0)
    oracle = AutoencoderKLWan(base_dim=16, z_dim=16, num_res_blocks=1).eval().requires_grad_(False)
    assert vae.state_dict().keys() == oracle.state_dict().keys()
    clip = train_vae.batch_of(0, 1, 5)
    latents = oracle.encode(clip).latent_dist.mean
    torch.testing.assert_close(vae.encode(clip).latent_dist.mean, latents, atol=5e-6, rtol=0)
    decoded = oracle.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(
        train_vae.decode_unclamped(vae, latents).clamp(-1, 1), decoded.clamp(-1, 1), atol=5e-6, rtol=0
    )


def test_one_step_of_every_phase_trains_what_it_should_and_the_file_loads(tmp_path: Path) -> None:
    vae = train_vae.new_vae(0)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    train_vae.run_phase(vae, train_vae.Phase("decoder", 5, 2, 1, 1e-3, decoder_only=True, bf16=False), scale=1)
    moved = {name.split(".")[0] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"decoder", "post_quant_conv"}
    train_vae.run_phase(vae, train_vae.Phase("short clips", 5, 2, 1, 1e-3), scale=1)
    moved = {name.split(".")[0] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {"encoder", "quant_conv", "decoder", "post_quant_conv"}

    path = tmp_path / "Wan2.1_VAE.pth"
    train_vae.save(vae, path, {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "_phases_done": 2})
    again = train_vae.new_vae(1)
    assert train_vae.load(again, path) == 2
    clip = train_vae.batch_of(9, 1, 5)
    with torch.no_grad():
        latents = again.eval().encode(clip).latent_dist.mean
    torch.testing.assert_close(load_vae(path).encode(clip), latents, atol=1e-5, rtol=0)
