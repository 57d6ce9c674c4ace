"""The VAE's files and shapes. Its numbers are compared in tests/parity."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mindspeed_mm.errors import DataError, WeightsError
from mindspeed_mm.models.wan.vae import load_vae
from mindspeed_mm.models.wan.vae_state_dict import vae_config, vae_key_map
from tests.support.errors import absent, raises
from tests.support.layouts import published_layout
from tests.support.tiny import VAE_FILE, tiny_vae, write_vae

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / VAE_FILE
    write_vae(path, tiny_vae())
    return path


@pytest.fixture(scope="module")
def vae(official):
    return load_vae(official)


def test_published_file_has_names_of_the_module():
    layout = published_layout(VAE_FILE)
    config = vae_config(layout)
    assert config == {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
    }
    names = vae_key_map(levels=4, res_blocks=2)
    with torch.device("meta"):
        module = AutoencoderKLWan(**config)
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    assert {names.to_theirs(name): shape for name, shape in layout.items()} == wanted
    assert {names.to_ours(name) for name in wanted} == layout.keys()


def test_onednn_convolutions_equal_diffusers(vae):
    plain = tiny_vae()
    video = torch.rand(1, 3, 5, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = vae.model.encode(video).latent_dist.mode()
    torch.testing.assert_close(found, plain.encode(video).latent_dist.mode(), atol=5e-6, rtol=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        vae.model.encode(video)
    names = {event.key for event in seen.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert "aten::slow_conv3d_forward" not in names  # torch's own choice for a batch of one


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_streamed_frames_are_the_decoded_clip(vae, frames):
    latents = torch.randn(16, (frames + 3) // 4, 3, 4, generator=torch.Generator().manual_seed(0))
    chunks = list(vae.decode_frames(latents))
    assert [chunk.shape[1] for chunk in chunks] == [1] + [4] * (frames // 4)
    whole = vae.decode(latents[None])[0]
    assert whole.shape == (3, frames, 24, 32)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, atol=1e-6, rtol=0)


def test_two_streams_at_a_time_do_not_mix(vae):
    one, two = torch.randn(2, 16, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    pairs = list(zip(vae.decode_frames(one), vae.decode_frames(two), strict=True))
    for chunks, latents in zip(zip(*pairs, strict=True), (one, two), strict=True):
        torch.testing.assert_close(torch.cat(chunks, dim=1), vae.decode(latents[None])[0], atol=1e-6, rtol=0)


def test_frames_beyond_4k_plus_1_are_dropped_as_upstream_does(vae):
    video = torch.rand(1, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(vae.encode(video), vae.encode(video[:, :, :5]))


def test_half_precision_vae_gives_fp32_latents(official):
    vae = load_vae(official, dtype=torch.bfloat16)
    video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(video)
    assert vae.dtype == torch.bfloat16
    assert latents.dtype == torch.float32
    assert vae.decode(latents).dtype == torch.float32
    assert load_vae(official).fingerprint == vae.fingerprint
    assert (latents - load_vae(official).encode(video)).abs().max() < 0.2


def test_nothing_is_recorded_for_backward(vae):
    video = torch.zeros(1, 3, 1, 16, 16, requires_grad=True)
    latents = vae.encode(video)
    assert not latents.requires_grad
    assert (
        latents.clone().requires_grad_().requires_grad
    )  # not an inference tensor either: trainers may continue with it


def test_vae_cache_is_as_large_as_800_decoded_frames():
    """Why tiles are not decoded frame by frame (docs/guide/generate.md): each would have to keep its own."""
    with torch.device("meta"):
        model = AutoencoderKLWan()
        model.clear_cache()
        for _ in range(3):
            frames = model.decoder(torch.empty(1, 16, 1, 8, 8), feat_cache=model._feat_map, feat_idx=[0])
    remembered = sum(part.numel() for part in model._feat_map if isinstance(part, torch.Tensor))
    assert remembered / frames[0, :, 0].numel() == pytest.approx(800, rel=0.03)


def test_tiling_is_off_by_default_and_streams_too(official):
    if not hasattr(load_vae(official).model, "use_tiling"):
        pytest.skip("this diffusers' VAE has no tiles")
    tiled = load_vae(official, tiling=True)
    tiled.enable_tiling((32, 32), (24, 24))
    latents = torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = tiled.decode(latents[None])[0]
    chunks = list(tiled.decode_frames(latents))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4]
    assert torch.equal(torch.cat(chunks, dim=1), whole)
    assert not torch.allclose(whole, load_vae(official).decode(latents[None])[0], atol=1e-4)
    assert not load_vae(official).tiled


def test_old_diffusers_without_tiles_still_decodes(official):
    latents = torch.randn(16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = load_vae(official).decode(latents[None])[0]
    vae = load_vae(official)
    vae.model.__dict__.pop("use_tiling", None)  # as with diffusers 0.33
    assert not vae.tiled
    torch.testing.assert_close(torch.cat(list(vae.decode_frames(latents)), dim=1), expected)
    with raises(WeightsError, "diffusers"):
        vae.enable_tiling()


@pytest.mark.parametrize("shape", [(1, 3, 5, 20, 16), (1, 4, 5, 16, 16), (3, 5, 16, 16)])
def test_pixels_that_do_not_fit_are_named(vae, shape):
    with raises(DataError, "multiples of 8"):
        vae.encode(torch.zeros(shape))


def test_latents_that_do_not_fit_are_named(vae):
    with raises(DataError, "[B, 16, F, h, w]"):
        vae.decode(torch.zeros(1, 15, 1, 2, 2))


# ---- files


def test_wrapped_state_dict_is_unwrapped(official, vae, tmp_path):
    torch.save({"model_state": torch.load(official, weights_only=True)}, tmp_path / "a.pth")
    assert load_vae(tmp_path / "a.pth").fingerprint == vae.fingerprint


def test_official_names_in_safetensors_are_read(official, vae, tmp_path):
    save_file(torch.load(official, weights_only=True), tmp_path / "wan_2.1_vae.safetensors")
    assert load_vae(tmp_path / "wan_2.1_vae.safetensors").fingerprint == vae.fingerprint


def test_missing_weight_and_a_foreign_one_are_named(official, tmp_path):
    state = torch.load(official, weights_only=True)
    state["decoder.conv1.bias_"] = state.pop("decoder.conv1.bias")
    torch.save(state, tmp_path / VAE_FILE)
    with raises(WeightsError, "decoder.conv1.bias_"):
        load_vae(tmp_path / VAE_FILE)
    del state["decoder.conv1.bias_"]
    torch.save(state, tmp_path / VAE_FILE)
    with raises(WeightsError, "1 missing", "decoder.conv_in.bias"):
        load_vae(tmp_path / VAE_FILE)


def test_weight_of_another_shape_is_named(official, tmp_path):
    state = torch.load(official, weights_only=True)
    state["decoder.head.2.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / VAE_FILE)
    with raises(WeightsError, "1 misshaped", "decoder.conv_out.bias"):
        load_vae(tmp_path / VAE_FILE)


class Bomb:
    """A pickle that would write a file if it were run."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"encoder.conv1.weight": Bomb(tmp_path / "boom")}, tmp_path / VAE_FILE)
    with raises(WeightsError, "never run"):
        load_vae(tmp_path / VAE_FILE)
    assert not (tmp_path / "boom").exists()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_one_line(official, tmp_path, data):
    raw = official.read_bytes()
    keep = data.draw(st.integers(0, len(raw) - 1))
    cut = tmp_path / VAE_FILE
    cut.write_bytes(raw[:keep])
    with pytest.raises(WeightsError) as error:
        load_vae(cut)
    assert str(error.value).startswith(str(cut))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        ({}, "one VAE"),
        ({"Wan2.1_VAE.pth": b"", "my_vae.pth": b""}, "Wan2.1_VAE.pth, my_vae.pth"),
        ({"config.json": b'{"_class_name": "AutoencoderKLWan"}'}, "no weights"),
        ({"config.json": b"{"}, "config.json:1:2"),
    ],
)
def test_folder_without_one_vae_is_named(tmp_path, files, fact):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with raises(WeightsError, fact):
        load_vae(tmp_path)


def test_path_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "nothing"
    with raises(WeightsError, absent(path), where=path):
        load_vae(path)


def test_config_of_another_model_is_named(tmp_path):
    tiny_vae().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim_mult": "wide"}))
    with raises(WeightsError, "dim_mult", "wide", "[1, 2, 4, 4]"):
        load_vae(tmp_path)
