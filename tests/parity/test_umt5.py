"""The text encoder of an official file computes what transformers' UMT5EncoderModel computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from mindspeed_mm.models.umt5.encoder import load_text_encoder
from tests.support.tiny import TEXT_FILE, TOKENIZER_FOLDER, tiny_umt5, write_tokenizer, write_umt5

PROMPTS = ("A red ball bounces in the snow", "cat", "", "a dog walks on the grass, " * 80)


@pytest.fixture(scope="module")
def oracle():
    return tiny_umt5()


@pytest.fixture(scope="module")
def official(oracle, tmp_path_factory):
    root = tmp_path_factory.mktemp("umt5")
    write_umt5(root / TEXT_FILE, oracle, torch.float32)
    write_tokenizer(root / TOKENIZER_FOLDER)
    return root


@torch.no_grad()
@pytest.mark.parametrize("together", [True, False])
def test_embeddings_are_the_valid_rows_of_512_padded_tokens(oracle, official, together):
    tokenizer = AutoTokenizer.from_pretrained(official / TOKENIZER_FOLDER)
    tokens = tokenizer(
        list(PROMPTS), padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    theirs = oracle(tokens.input_ids, tokens.attention_mask).last_hidden_state
    lengths = tokens.attention_mask.sum(dim=1).tolist()
    encoder = load_text_encoder(official / TEXT_FILE, dtype=torch.float32)
    ours = encoder.encode(PROMPTS) if together else [encoder.encode([prompt])[0] for prompt in PROMPTS]
    assert [len(rows) for rows in ours] == lengths
    assert 1 in lengths  # "" is one token, </s>
    assert 512 in lengths  # the long one is cut
    for rows, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(rows, expected[: len(rows)], atol=2e-5, rtol=0)


@pytest.mark.parametrize("where", ["text_encoder folder", "model root", "official root"])
def test_every_form_of_an_encoder_embeds_equally(oracle, official, where, tmp_path):
    path = official
    if where != "official root":
        oracle.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
        write_tokenizer(tmp_path / "tokenizer")
        assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1  # sharded, with an index
        path = tmp_path if where == "model root" else tmp_path / "text_encoder"
    expected = load_text_encoder(official / TEXT_FILE, dtype=torch.float32)
    found = load_text_encoder(path, dtype=torch.float32)
    for ours, theirs in zip(found.encode(PROMPTS), expected.encode(PROMPTS), strict=True):
        assert torch.equal(ours, theirs)
    assert found.fingerprint == expected.fingerprint


def test_embedding_table_is_in_memory_once(official):
    encoder = load_text_encoder(official, dtype=torch.bfloat16)
    assert encoder.model.shared.weight is encoder.model.encoder.embed_tokens.weight
    assert encoder.dtype == torch.bfloat16
