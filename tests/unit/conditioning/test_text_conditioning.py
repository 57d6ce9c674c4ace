"""Captions to embeddings: one at a time, and equal ones once."""

import torch

from mindspeed_mm.conditioning.text import PromptCache, encode_prompt


class Lengths:
    """A stand-in text encoder: as many rows as the prompt has words, and one for its end."""

    def __init__(self):
        self.calls = []

    def encode(self, prompts):
        self.calls.append(list(prompts))
        return tuple(torch.full((len(prompt.split()) + 1, 4), float(len(prompt))) for prompt in prompts)


def test_prompts_are_encoded_one_by_one():
    encoder = Lengths()
    embeds = encode_prompt(encoder, ["a red ball", "", "snow"])
    assert encoder.calls == [["a red ball"], [""], ["snow"]]
    assert [len(rows) for rows in embeds] == [4, 1, 2]


def test_equal_captions_are_encoded_once_while_cached():
    encoder = Lengths()
    cache = PromptCache(encoder, size=2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(cache.encode(["x", "x y", "x"]), cache.encode(["x", "x y", "x"]), strict=True)
    )
    assert encoder.calls == [["x"], ["x y"]]
    cache.encode(["z"])
    cache.encode(["x y"])
    assert encoder.calls == [["x"], ["x y"], ["z"], ["x y"]]
