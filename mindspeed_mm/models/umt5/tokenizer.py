"""Captions → tokens, with the official cleaning before."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
from torch import Tensor
from transformers import AutoTokenizer

from mindspeed_mm.errors import WeightsError

FILES = ("tokenizer.json", "spiece.model")  # either makes a folder a tokenizer's


def clean_prompt(text: str) -> str:
    """The official cleaning: mend encodings, resolve HTML entities, collapse white space."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(mended.split())


class Tokenizer:
    """A tokenizer folder such as google/umt5-xxl. Raises WeightsError when it cannot be read."""

    def __init__(self, folder: Path, text_len: int) -> None:
        self.text_len = text_len
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a damaged folder makes transformers raise
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"{folder}: not readable as a tokenizer ({reason}); fetch the folder again") from None
        self._tokenizer.padding_side = "right"

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask [B, L], padded right to the longest of them, cut at text_len."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        tokens = self._tokenizer(
            cleaned,
            padding="longest",
            truncation=True,
            max_length=self.text_len,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    @property
    def fingerprint(self) -> str:
        """A hash of its vocabulary."""
        pieces = sorted(self._tokenizer.get_vocab().items())
        return hashlib.sha256(repr(pieces).encode()).hexdigest()[:32]


def find_tokenizer(weights: Path) -> Path:
    """The tokenizer folder that belongs to a text encoder's file or folder. Raises WeightsError when there is none."""
    home = weights if weights.is_dir() else weights.parent
    tried = [home, home / "tokenizer", home / "google" / "umt5-xxl", home.parent / "tokenizer"]
    for folder in tried:
        if any((folder / name).is_file() for name in FILES):
            return folder
    raise WeightsError(
        f"{weights}: no tokenizer beside it (looked for {FILES[0]} in {', '.join(map(str, tried))}); "
        "set tokenizer_config.from_pretrained"
    )
