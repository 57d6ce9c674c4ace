"""Weights with NaN or Inf in them are named on load, with their count.

Integer weights are refused before they are read.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.finite import check_weights, count_nonfinite, is_finite
from mindspeed_mm.models.load_model import load_transformer
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.wan.vae import load_vae
from tests.support.errors import raises
from tests.support.tiny import TEXT_FILE, TRANSFORMER_FILE, VAE_FILE, write_official

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    write_official(root)
    return root


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_in_every_dtype(dtype, bad):
    weight = torch.randn(1000, 37).to(dtype)
    assert is_finite(weight)
    weight[7, 3] = weight[9, 1] = bad
    assert not is_finite(weight)
    assert count_nonfinite(weight) == 2


def test_sum_that_overflows_is_not_mistaken_for_a_bad_value():
    assert is_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert is_finite(torch.full((4,), 3e38))


def test_both_signs_of_infinity_do_not_cancel():
    assert not is_finite(torch.tensor([float("inf"), 0.0, -float("inf")]))


def test_fp8_weights_are_checked_too():
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    assert is_finite(weight)
    weight.view(torch.uint8)[0, 0] = 0x7F  # NaN
    assert count_nonfinite(weight) == 1


def test_message_names_tensors_and_counts():
    weights = {"a.weight": torch.tensor([1.0, float("nan"), float("inf")]), "b.weight": torch.ones(2)}
    with raises(WeightsError, "1 weight", "a.weight", "2 of 3", where="here"):
        check_weights("here", weights)


def test_nan_in_a_transformer_file_is_named_on_load(folder, tmp_path):
    weights = load_file(folder / TRANSFORMER_FILE)
    weights["blocks.0.ffn.0.weight"][0, :3] = float("nan")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / TRANSFORMER_FILE)
    with raises(WeightsError, "blocks.0.ffn.0.weight", "3 of"):
        load_transformer(tmp_path, dtype=torch.float32)


def damaged(source, target, change):
    state = torch.load(source, weights_only=True)
    name = next(name for name, weight in state.items() if weight.dim() > 1)
    state[name] = change(state[name])
    torch.save(state, target)
    if source.with_suffix(".json").exists():
        target.with_suffix(".json").write_text(source.with_suffix(".json").read_text())
    return name


def with_inf(weight):
    weight.view(-1)[5] = float("inf")
    return weight


def test_inf_in_the_vae_is_named_on_load(folder, tmp_path):
    damaged(folder / VAE_FILE, tmp_path / VAE_FILE, with_inf)
    with raises(WeightsError, VAE_FILE, "1 of"):
        load_vae(tmp_path / VAE_FILE)


def test_inf_in_the_text_encoder_is_named_on_load(folder, tmp_path):
    damaged(folder / TEXT_FILE, tmp_path / TEXT_FILE, with_inf)
    with raises(WeightsError, TEXT_FILE, "1 of"):
        load_text_encoder(tmp_path / TEXT_FILE, folder / "google" / "umt5-xxl")


@pytest.mark.parametrize("file", [VAE_FILE, TEXT_FILE])
def test_integer_weights_are_rejected_by_name(folder, tmp_path, file):
    name = damaged(folder / file, tmp_path / file, lambda weight: weight.to(torch.int32))
    load = load_vae if file == VAE_FILE else load_text_encoder
    with raises(WeightsError, file, name, "int32"):
        load(
            tmp_path / file,
            **({} if file == VAE_FILE else {"tokenizer_path": folder / "google" / "umt5-xxl"}),
        )
