"""Captions → prompt_embeds: the one path for extraction and generation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TextEncoder(Protocol):
    """What conditioning needs of a text encoder."""

    def encode(self, prompts: Sequence[str], /) -> tuple[Tensor, ...]:
        """Each prompt to [L, text_dim], valid tokens only."""
        ...


def encode_prompt(text_encoder: TextEncoder, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Each prompt to [L, text_dim], valid tokens only; "" gives the null embedding.

    One prompt at a time: its embedding must not depend, even by rounding, on what else is encoded with it.
    """
    return tuple(text_encoder.encode([prompt])[0] for prompt in prompts)


class PromptCache:
    """The latest prompts' embeddings, on the CPU; equal captions in a dataset are common."""

    def __init__(self, text_encoder: TextEncoder, size: int = 256) -> None:
        self.text_encoder = text_encoder
        self.size = size
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """As `encode_prompt`, with the tensors on the CPU."""
        return tuple(self._one(prompt) for prompt in prompts)

    def _one(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            self._known[prompt] = encode_prompt(self.text_encoder, [prompt])[0].cpu()
            if len(self._known) > self.size:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]
