"""A tokenizer without its vocabulary or of another encoder, and another model's config.json, are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mindspeed_mm.errors import DataError, WeightsError
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.umt5.tokenizer import Tokenizer
from mindspeed_mm.models.wan.vae import load_vae
from tests.support.errors import raises
from tests.support.tiny import (
    TEXT_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    tiny_umt5,
    tiny_vae,
    write_tokenizer,
    write_umt5,
    write_vae,
)

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("umt5")
    write_umt5(root / TEXT_FILE, tiny_umt5())
    write_tokenizer(root / TOKENIZER_FOLDER)
    return root


@pytest.fixture
def tokenizer(official, tmp_path):
    return shutil.copytree(official / TOKENIZER_FOLDER, tmp_path / "tokenizer")


def test_folder_without_a_vocabulary_names_what_to_fetch(official, tokenizer):
    (tokenizer / "tokenizer.json").unlink()
    with raises(WeightsError, "tokenizer.json", "spiece.model", "umt5-xxl"):
        load_text_encoder(official, tokenizer)


def test_dangling_links_of_a_tokenizer_are_named(official, tokenizer):
    for path in tokenizer.iterdir():
        path.unlink()
        path.symlink_to(f"/gone/{path.name}")
    with pytest.raises(WeightsError, match=r"tokenizer\S*\.json: .*/gone/\S+\.json"):
        load_text_encoder(official, tokenizer)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer/tokenizer.json"])
def test_dangling_link_next_to_the_encoder_is_named(official, tmp_path, name):
    file = shutil.copy(official / TEXT_FILE, tmp_path / TEXT_FILE)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("/gone/blob")
    with raises(WeightsError, name, "/gone/blob"):
        load_text_encoder(file)


def test_byte_order_mark_in_the_encoders_config_is_skipped(official, tmp_path):
    folder = transformers_folder(tmp_path, {})
    plain = load_text_encoder(folder, official / TOKENIZER_FOLDER)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    marked = load_text_encoder(folder, official / TOKENIZER_FOLDER)
    assert torch.equal(plain.encode(["a cat"])[0], marked.encode(["a cat"])[0])


def test_tokenizer_json_alone_gives_the_same_tokens(official, tokenizer):
    (tokenizer / "tokenizer_config.json").unlink()
    prompts = ["a red ball bounces", "a cat", ""]
    mine, whole = Tokenizer(tokenizer, 16)(prompts), Tokenizer(official / TOKENIZER_FOLDER, 16)(prompts)
    assert torch.equal(mine[0], whole[0])
    assert torch.equal(mine[1], whole[1])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[1]", "null", "{", '{"tokenizer_class": {"a": 1}, "model": 3}'])
def test_damaged_tokenizer_files_are_named(tokenizer, name, text):
    (tokenizer / name).write_text(text)
    with pytest.raises(WeightsError) as caught:
        Tokenizer(tokenizer, 16)
    assert str(tokenizer) in str(caught.value)
    assert "object has no" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_byte_order_mark_of_a_tokenizer_is_named(tokenizer, name):
    path = tokenizer / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with raises(WeightsError, "byte order", where=path):
        Tokenizer(tokenizer, 16)


def test_vocabulary_without_a_padding_token_is_one_line(tokenizer):
    (tokenizer / "tokenizer_config.json").unlink()
    text = (tokenizer / "tokenizer.json").read_text().replace("<pad>", "<nop>")
    (tokenizer / "tokenizer.json").write_text(text)
    with raises(WeightsError, "padding token", "<pad>"):
        Tokenizer(tokenizer, 16)


@pytest.mark.parametrize("rows", [59, 119, 2000])
def test_vocabulary_of_another_encoder_names_both_sizes(official, rows):
    tokenizer = Tokenizer(official / TOKENIZER_FOLDER, 16)
    tokenizer.check_fits(120, official)
    tokenizer.check_fits(128, official)  # an embedding is padded to a round number
    with raises(WeightsError, "119 tokens", f"{rows} rows", where=tokenizer.folder):
        tokenizer.check_fits(rows, official)


@pytest.mark.parametrize(
    ("ids", "rows", "fits"),
    [
        (range(256300), 256384, True),
        (range(256000), 256384, True),  # without the extra ids
        (range(250100), 256384, False),  # mT5's
        (range(128192), 256384, False),  # one half
        (range(256385), 256384, False),
        ([0, 1, 2, 256299], 256384, False),  # ids with a gap
        (range(60), 120, False),
        (range(110), 120, True),
    ],
)
def test_every_token_has_a_row_and_few_rows_no_token(official, ids, rows, fits):
    tokenizer = Tokenizer(official / TOKENIZER_FOLDER, 16)
    tokenizer._ids = {str(number): number for number in ids}
    if fits:
        tokenizer.check_fits(rows, official)
    else:
        with raises(WeightsError, len(ids), rows, where=tokenizer.folder):
            tokenizer.check_fits(rows, official)


def test_loading_compares_vocabulary_and_embedding(official, tmp_path):
    from transformers import T5Tokenizer

    small = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)], extra_ids=0)
    small.save_pretrained(str(tmp_path))
    with raises(WeightsError, "4 tokens", "120 rows"):
        load_text_encoder(official, tmp_path)


def test_prompt_of_unknown_tokens_alone_is_rejected(official):
    encoder = load_text_encoder(official)
    with raises(DataError, "猫 猫", "<unk>", "120 tokens"):
        encoder.encode(["a cat", "猫 猫"])
    assert len(encoder.encode(["猫 a", ""])) == 2


# ---- config.json


def transformers_folder(folder, changes):
    tiny_umt5().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"layer_norm_epsilon": float("nan")}, ("NaN",)),
        ({"layer_norm_epsilon": "small"}, ("layer_norm_epsilon", "small")),
        ({"num_layers": 1.5}, ("num_layers", 1.5)),
        ({"d_model": -1}, ("d_model", -1)),
        ({"num_heads": True}, ("num_heads", True)),
    ],
)
def test_impossible_number_of_the_text_encoder_is_named(official, tmp_path, changes, facts):
    with raises(WeightsError, "config.json", *facts):
        load_text_encoder(transformers_folder(tmp_path, changes), official / TOKENIZER_FOLDER)


@pytest.mark.parametrize(("key", "value"), [("num_heads", 2), ("num_layers", 3)])
def test_config_next_to_the_official_text_encoder_must_agree(official, tmp_path, key, value):
    transformers_folder(tmp_path, {key: value})
    (tmp_path / "model.safetensors").unlink()
    file = shutil.copy(official / TEXT_FILE, tmp_path / TEXT_FILE)
    with raises(WeightsError, "config.json", TEXT_FILE, key, value):
        load_text_encoder(file, official / TOKENIZER_FOLDER)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"base_dim": 16}, ("base_dim", 16, 8)),
        ({"latents_std": [float("nan")] * 16}, ("NaN",)),
        ({"latents_std": [0] * 16}, ("latents_std", 0)),
        ({"latents_mean": "zero"}, ("latents_mean", "zero")),
        ({"latents_mean": None}, ("latents_mean", "null")),
        ({"latents_std": None}, ("latents_std", "null")),
        ({"latents_mean": [0.0] * 4}, ("latents_mean", 4, 16)),
    ],
)
def test_json_next_to_the_vae_must_agree(tmp_path, changes, facts):
    write_vae(tmp_path / VAE_FILE, tiny_vae())
    beside = (tmp_path / VAE_FILE).with_suffix(".json")
    values = json.loads(beside.read_text()) if beside.exists() else {}
    beside.write_text(json.dumps({**values, **changes}))
    with raises(WeightsError, beside, *facts) as caught:
        load_vae(tmp_path / VAE_FILE)
    assert str(beside) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_epsilon", 1e-5),
        ("relative_attention_max_distance", 64),
        ("feed_forward_proj", "gated-silu"),
        ("dense_act_fn", "relu"),
        ("is_gated_act", False),
        ("is_decoder", True),
    ],
)
@pytest.mark.parametrize("form", ["official", "transformers"])
def test_another_arithmetic_of_umt5_is_rejected(official, tmp_path, form, key, value):
    path = transformers_folder(tmp_path, {key: value})
    if form == "official":
        (tmp_path / "model.safetensors").unlink()
        path = shutil.copy(official / TEXT_FILE, tmp_path / TEXT_FILE)
    with raises(WeightsError, value, where=f"{tmp_path / 'config.json'}:{key}"):
        load_text_encoder(path, official / TOKENIZER_FOLDER)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_scales", [1.0]),
        ("is_residual", True),
        ("in_channels", 12),
        ("out_channels", 4),
        ("patch_size", 2),
        ("decoder_base_dim", 256),
        ("scale_factor_temporal", 8),
        ("scale_factor_spatial", 16),
    ],
)
def test_another_arithmetic_of_the_vae_is_rejected(tmp_path, key, value):
    with raises(WeightsError, value, where=f"{tmp_path / 'config.json'}:{key}"):
        load_vae(vae_folder(tmp_path, {key: value}))


def vae_folder(folder, changes):
    tiny_vae().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 10**9), ("num_hidden_layers", 10**9), ("d_ff", 2**31 - 1), ("num_labels", 10**12)],
)
def test_config_cannot_make_the_text_encoder_large(official, tmp_path, key, value):
    folder = transformers_folder(tmp_path, {key: value})
    if key == "num_labels":  # nothing of an encoder
        assert load_text_encoder(folder, official / TOKENIZER_FOLDER).text_dim
        return
    with raises(WeightsError, value, key.replace("hidden_", "")):
        load_text_encoder(folder, official / TOKENIZER_FOLDER)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_res_blocks", 10**9), ("dim_mult", [1] * 100_000), ("base_dim", 2**62), ("z_dim", 2**40)],
)
def test_config_cannot_make_the_vae_large(tmp_path, key, value):
    with raises(WeightsError, key):
        load_vae(vae_folder(tmp_path, {key: value}))


@pytest.mark.timeout(20)
def test_name_cannot_make_an_official_file_large(official, tmp_path):
    state = torch.load(official / TEXT_FILE, weights_only=True)
    state[f"blocks.{10**11}.norm1.weight"] = torch.ones(1)
    torch.save(state, tmp_path / TEXT_FILE)
    with raises(WeightsError, 10**11, "unknown"):
        load_text_encoder(tmp_path / TEXT_FILE, official / TOKENIZER_FOLDER)
    write_vae(tmp_path / VAE_FILE, tiny_vae())
    state = torch.load(tmp_path / VAE_FILE, weights_only=True)
    state[f"encoder.downsamples.{10**11}.residual.6.weight"] = torch.ones(1)
    torch.save(state, tmp_path / VAE_FILE)
    with raises(WeightsError):
        load_vae(tmp_path / VAE_FILE)
