"""Captions are cleaned as upstream cleans them, and every form of the text encoder's files is found.

Numbers: tests/parity.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import UMT5Config, UMT5EncoderModel

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.models.umt5.encoder import load_text_encoder
from mindspeed_mm.models.umt5.state_dict import UMT5_KEY_MAP, umt5_config
from mindspeed_mm.models.umt5.tokenizer import clean_prompt
from tests.support.errors import raises
from tests.support.layouts import published_layout
from tests.support.tiny import TEXT_FILE, TOKENIZER_FOLDER, tiny_umt5, write_tokenizer, write_umt5


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("umt5")
    write_umt5(root / TEXT_FILE, tiny_umt5())
    write_tokenizer(root / TOKENIZER_FOLDER)
    return root


def test_published_file_has_names_of_the_module():
    layout = published_layout(TEXT_FILE)
    config = umt5_config(layout)
    sizes = {
        name: config[name] for name in ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")
    }
    assert sizes == {
        "vocab_size": 256384,
        "d_model": 4096,
        "num_heads": 64,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
    }
    assert config["relative_attention_num_buckets"] == 32
    with torch.device("meta"):
        module = UMT5EncoderModel(UMT5Config(**config))
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    del wanted["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    assert {UMT5_KEY_MAP.to_theirs(name): shape for name, shape in layout.items()} == wanted
    assert {UMT5_KEY_MAP.to_ours(name) for name in wanted} == layout.keys()


def test_sizes_from_weights_equal_transformers_config(official):
    written = tiny_umt5().config
    config = load_text_encoder(official).model.config
    for name in (
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_layers",
        "dense_act_fn",
        "is_gated_act",
        "layer_norm_epsilon",
    ):
        assert getattr(config, name) == getattr(written, name), name


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  cat\n\tsits ", "a cat sits"),
        ("a cat，on a mat", "a cat,on a mat"),
        ("fish &amp;amp; chips &lt;b&gt;", "fish & chips <b>"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("一只猫 走路", "一只猫 走路"),
        ("", ""),
    ],
)
def test_cleaning_is_the_official_one(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_cleaning_comes_before_the_tokens(official):
    encoder = load_text_encoder(official)
    dirty, clean = encoder.encode(["a  cat&amp;amp;\n"])[0], encoder.encode(["a cat&"])[0]
    assert torch.equal(dirty, clean)


def test_prompts_longer_than_the_model_takes_are_cut(official):
    encoder = load_text_encoder(official, text_len=16)
    rows = encoder.encode(["cat " * 50, "cat"])
    assert [len(row) for row in rows] == [16, 2]
    assert rows[0].shape[1] == encoder.text_dim == 32
    assert encoder.encode([]) == ()


def test_many_prompts_give_what_each_alone_gives(official):
    encoder = load_text_encoder(official, dtype=torch.float32)
    prompts = [f"a {'red ' * n} ball" for n in range(11)]
    for together, prompt in zip(encoder.encode(prompts), prompts, strict=True):
        torch.testing.assert_close(together, encoder.encode([prompt])[0], atol=2e-5, rtol=0)


def test_fingerprint_is_of_weights_and_vocabulary(official, tmp_path):
    mine = load_text_encoder(official)
    assert load_text_encoder(official, dtype=torch.float32).fingerprint == mine.fingerprint
    write_umt5(tmp_path / TEXT_FILE, tiny_umt5(seed=1))
    assert load_text_encoder(tmp_path, official / TOKENIZER_FOLDER).fingerprint != mine.fingerprint
    words = json.loads((official / TOKENIZER_FOLDER / "tokenizer.json").read_text())
    words["model"]["vocab"][-1][0] = "ß"
    write_tokenizer(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    assert load_text_encoder(official, tmp_path / "other").fingerprint != mine.fingerprint


# ---- files


def test_without_a_tokenizer_the_places_looked_at_are_named(tmp_path):
    write_umt5(tmp_path / TEXT_FILE, tiny_umt5())
    with raises(WeightsError, "google/umt5-xxl"):
        load_text_encoder(tmp_path / TEXT_FILE)


def test_damaged_tokenizer_is_one_line(official, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with raises(WeightsError, "tokenizer.json:1:9", "JSON") as error:
        load_text_encoder(official, tmp_path)
    assert "\n" not in str(error.value)


def test_file_of_something_else_is_named(official, tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "t5.pth")
    with raises(WeightsError, "UMT5"):
        load_text_encoder(tmp_path, official / TOKENIZER_FOLDER)


def test_missing_shard_is_named(official, tmp_path):
    tiny_umt5().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with raises(WeightsError, shard.name):
        load_text_encoder(tmp_path, official / TOKENIZER_FOLDER)


def test_model_with_another_number_of_layers_is_named(official, tmp_path):
    tiny_umt5().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with raises(WeightsError, "num_layers", 3, 2):
        load_text_encoder(tmp_path, official / TOKENIZER_FOLDER)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_one_line(official, tmp_path, data):
    raw = (official / TEXT_FILE).read_bytes()
    cut = tmp_path / TEXT_FILE
    cut.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(WeightsError) as error:
        load_text_encoder(cut, official / TOKENIZER_FOLDER)
    assert str(error.value).startswith(str(cut))
    assert "\n" not in str(error.value)
