"""Encodes captions to prompt_embeds, for both extraction and generation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TextEncoder(Protocol):
    """The text encoder interface that conditioning requires."""

    def encode(self, prompts: Sequence[str], /) -> tuple[Tensor, ...]:
        """Encode each prompt to embeddings [L, text_dim] of its L valid tokens."""
        ...


def encode_prompt(text_encoder: TextEncoder, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Encode each prompt to embeddings [L, text_dim] of its L valid tokens; "" gives the null embedding.

    Prompts are encoded one at a time, because a batch would change the rounding of the embeddings.
    """
    return tuple(text_encoder.encode([prompt])[0] for prompt in prompts)


class PromptCache:
    """Caches the embeddings of recent prompts on the CPU, because many clips share a caption."""

    def __init__(self, text_encoder: TextEncoder, size: int = 256) -> None:
        self.text_encoder = text_encoder
        self.size = size
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Encode prompts like `encode_prompt`, and return tensors on the CPU."""
        return tuple(self._encode_one(prompt) for prompt in prompts)

    def _encode_one(self, prompt: str) -> Tensor:
        if prompt not in self._cache:
            self._cache[prompt] = encode_prompt(self.text_encoder, [prompt])[0].cpu()
            if len(self._cache) > self.size:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]
