"""The VAE of an official file computes what diffusers' AutoencoderKLWan computes on the same weights."""

from __future__ import annotations

import json

import pytest
import torch

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.wan.vae import load_vae
from tests.support.errors import raises
from tests.support.tiny import VAE_FILE, tiny_vae, write_vae

MEAN = (
    -0.7571,
    -0.7089,
    -0.9113,
    0.1075,
    -0.1745,
    0.9653,
    -0.1517,
    1.5508,
    0.4134,
    -0.0715,
    0.5517,
    -0.3632,
    -0.1922,
    -0.9497,
    0.2503,
    -0.2921,
)
STD = (
    2.8184,
    1.4541,
    2.3275,
    2.6558,
    1.2196,
    1.7708,
    2.6052,
    2.0743,
    3.2687,
    2.1526,
    2.8652,
    1.5579,
    1.6382,
    1.1253,
    2.8251,
    1.9160,
)
ROUNDING = 5e-6  # oneDNN sums in another order than the loop that torch picks for small inputs


@pytest.fixture(scope="module")
def oracle():
    return tiny_vae()


@pytest.fixture(scope="module")
def official(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / VAE_FILE
    write_vae(path, oracle)
    return path


@pytest.fixture(scope="module")
def video():
    return torch.rand(2, 3, 9, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def per_channel(values):
    return torch.tensor(values).view(1, -1, 1, 1, 1)


@torch.no_grad()
def test_latents_are_the_normalized_mode(oracle, official, video):
    mode = oracle.encode(video).latent_dist.mode()
    latents = load_vae(official).encode(video)
    assert latents.shape == (2, 16, 3, 3, 5)
    torch.testing.assert_close(latents, (mode - per_channel(MEAN)) / per_channel(STD), atol=ROUNDING, rtol=0)


@torch.no_grad()
def test_decoding_denormalizes_and_clamps(oracle, official):
    latents = 3 * torch.randn(2, 16, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    theirs = oracle.decode(latents * per_channel(STD) + per_channel(MEAN)).sample
    ours = load_vae(official).decode(latents)
    assert ours.shape == (2, 3, 9, 24, 40)
    assert ours.abs().max() <= 1
    torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    "where", ["folder with config.json", "model root with vae/", "official root", "safetensors file"]
)
def test_every_form_of_a_vae_gives_the_same_latents(oracle, official, video, where, tmp_path):
    if where == "folder with config.json":
        oracle.save_pretrained(path := tmp_path)
    elif where == "model root with vae/":
        oracle.save_pretrained((path := tmp_path) / "vae")
    elif where == "official root":
        write_vae((path := tmp_path) / VAE_FILE, oracle)
    else:
        oracle.save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
    expected, found = load_vae(official), load_vae(path)
    assert torch.equal(found.encode(video), expected.encode(video))
    assert found.fingerprint == expected.fingerprint


def test_vae_statistics_are_read_from_the_json_next_to_it(oracle, video, tmp_path):
    write_vae(path := tmp_path / "mine.pth", oracle)
    plain = load_vae(path)
    (tmp_path / "mine.json").write_text(json.dumps({"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}))
    mine = load_vae(path)
    expected = (plain.encode(video) * per_channel(STD) + per_channel(MEAN) - 0.5) / 2
    torch.testing.assert_close(mine.encode(video), expected, atol=1e-6, rtol=0)
    assert mine.fingerprint != plain.fingerprint


def test_file_of_something_else_is_named(tmp_path):
    torch.save({"weight": torch.ones(1)}, path := tmp_path / VAE_FILE)
    with raises(WeightsError, "VAE"):
        load_vae(path)
