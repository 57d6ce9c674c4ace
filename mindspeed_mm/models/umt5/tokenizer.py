"""Tokenizes captions after the official text cleaning."""

from __future__ import annotations

import codecs
import hashlib
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
from torch import Tensor
from transformers import AutoTokenizer

from mindspeed_mm.errors import DataError, WeightsError
from mindspeed_mm.files import read_json_object, regular_file, stat_path
from mindspeed_mm.log import get_logger

logger = get_logger(__name__)
FILES = ("tokenizer.json", "spiece.model")  # a tokenizer folder has at least one
_FETCH = (
    "download google/umt5-xxl of Wan2.1 (tokenizer.json, tokenizer_config.json, special_tokens_map.json, "
    "spiece.model)"
)
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_MAX_REPORTED = 5  # prompts reported as truncated
_MAX_LISTED = 10  # truncated captions listed for a dataset
_PADDING = 1024  # maximum number of embedding rows without a token


def clean_prompt(text: str) -> str:
    """Clean a prompt like the official code: fix encodings, unescape HTML, collapse whitespace."""
    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(mended.split())


class Tokenizer:
    """A tokenizer folder such as google/umt5-xxl.

    Raises WeightsError if it cannot be read or has no vocabulary.
    """

    def __init__(self, folder: Path, text_len: int) -> None:
        self.folder = folder
        self.text_len = text_len
        self.reported: set[str] = set()  # prompts already reported as truncated
        if not has_vocabulary(folder):
            raise WeightsError(f"contains neither {' nor '.join(FILES)}", where=folder, fix=_FETCH)
        for path in (*folder.glob("*.json"), *folder.glob("*.model")):
            regular_file(path, WeightsError)
            _refuse_bom(path)
            if path.suffix == ".json" and path.name != FILES[0]:  # tokenizer.json is large and read below
                read_json_object(path, WeightsError)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            self._ids: dict[str, int] = self._tokenizer.get_vocab()
        except Exception as error:  # transformers raises many types of errors for a damaged folder
            raise WeightsError(
                _why_unreadable(folder, error), where=folder, fix="download the folder again"
            ) from None
        self._tokenizer.padding_side = "right"
        self._name_special_tokens()

    def __len__(self) -> int:
        return 1 + max(self._ids.values(), default=-1)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, both [B, L].

        Prompts are right-padded to the longest and truncated to text_len. Raises DataError for a prompt that
        has no token in the vocabulary.
        """
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
        full = tokens.attention_mask.sum(dim=1) >= self.text_len
        self._report_cuts([prompt for prompt, is_full in zip(cleaned, full.tolist(), strict=True) if is_full])
        for prompt, ids in zip(cleaned, tokens.input_ids.tolist(), strict=True):
            self._check_known(prompt, ids)
        return tokens.input_ids, tokens.attention_mask

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Return the token count of each prompt before truncation, including </s>."""
        if not prompts:
            return []
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        return [
            len(ids) for ids in self._tokenizer(cleaned, add_special_tokens=True, verbose=False).input_ids
        ]

    def report_long(self, captions: Iterable[tuple[str, str]]) -> None:
        """Log one warning that lists the captions longer than text_len with their token counts.

        Args:
            captions: location and text of each, such as `("data.json[17]", "a red ball bounces")`.
        """
        captions = list(captions)
        # Each token takes at least one byte, so most captions need not be tokenized.
        long = [(address, text) for address, text in captions if len(text.encode()) >= self.text_len]
        counts = zip(long, self.count([text for _, text in long]), strict=True)
        too_long = [(address, text, tokens) for (address, text), tokens in counts if tokens > self.text_len]
        if not too_long:
            return
        self.reported.update(clean_prompt(text) for _, text, _ in too_long)
        listed = ", ".join(f"{address} ({tokens})" for address, _, tokens in too_long[:_MAX_LISTED])
        more = f" and {len(too_long) - _MAX_LISTED} more" if len(too_long) > _MAX_LISTED else ""
        logger.warning(
            f"{len(too_long)} of {len(captions)} captions have more than {self.text_len} tokens and are "
            f"truncated: {listed}{more}; shorten them if their end matters"
        )

    def _report_cuts(self, cleaned: Sequence[str]) -> None:
        """Warn about the first few prompts longer than text_len."""
        for prompt, tokens in zip(cleaned, self.count(cleaned), strict=True):
            if tokens > self.text_len and prompt not in self.reported and len(self.reported) < _MAX_REPORTED:
                self.reported.add(prompt)
                last = "; further ones are not reported" if len(self.reported) == _MAX_REPORTED else ""
                logger.warning(
                    f"prompt {prompt[:40]!r}… has {tokens} tokens; the model reads the first "
                    f"{self.text_len}{last}"
                )

    def check_fits(self, rows: int, encoder: Path) -> None:
        """Raise WeightsError unless the vocabulary fits an encoder whose embedding has `rows` rows.

        Each token needs a row. Embeddings are padded (UMT5-XXL: 256384 rows for 256300 tokens), so up to 1024
        rows, and at most an eighth of all rows, may be unused.
        """
        tokens = len(set(self._ids.values()))
        if not (len(self) <= rows and tokens >= rows - min(_PADDING, rows // 8)):
            raise WeightsError(
                f"has {tokens} tokens with ids up to {len(self) - 1}, but the embedding of {encoder} has "
                f"{rows} rows: this is the tokenizer of another text encoder",
                where=self.folder,
                fix=_FETCH,
            )

    def _name_special_tokens(self) -> None:
        """Set the padding, end and unknown tokens, which a tokenizer.json alone does not define."""
        for role, token in _SPECIAL.items():
            if getattr(self._tokenizer, role) is None and token in self._ids:
                setattr(self._tokenizer, role, token)
        if self._tokenizer.pad_token is None:
            raise WeightsError(
                f"names no padding token, and {_SPECIAL['pad_token']} is not in its vocabulary",
                where=self.folder,
                fix=_FETCH,
            )

    def _check_known(self, prompt: str, ids: Sequence[int]) -> None:
        unknown = self._tokenizer.unk_token_id
        silent = {*self._tokenizer.all_special_ids, self._ids.get("\u2581")}  # carry no text
        if prompt and unknown in ids and all(token in silent for token in ids):
            raise DataError(
                f"every token is {self._tokenizer.unk_token}: the vocabulary of {self.folder} ({len(self)} "
                "tokens) knows none of it",
                where=f"prompt {prompt!r:.80}",
                fix=f"rephrase it, or {_FETCH}",
            )

    @property
    def fingerprint(self) -> str:
        """Return a hash of the vocabulary."""
        pieces = sorted(self._ids.items())
        return hashlib.sha256(repr(pieces).encode()).hexdigest()[:32]


def _refuse_bom(path: Path) -> None:
    """Raise WeightsError for a byte order mark (as from Notepad), which transformers cannot read."""
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            raise WeightsError(
                "begins with a byte order mark",
                where=path,
                fix="save it as UTF-8 without one, or download it again",
            )


def _why_unreadable(folder: Path, error: Exception) -> str:
    """Explain why transformers cannot read `folder`. Raises WeightsError if tokenizer.json is not JSON."""
    if (folder / FILES[0]).is_file():
        read_json_object(folder / FILES[0], WeightsError)
    said = " ".join(str(error).split())[:200] if isinstance(error, OSError | ValueError) else ""
    return (
        f"not readable as a tokenizer ({said})"
        if said
        else "its files are JSON, but not those of a tokenizer"
    )


def has_vocabulary(folder: Path) -> bool:
    """Return whether `folder` is a tokenizer folder.

    A dangling symlink also counts, so that reading it reports the missing target.
    """
    return any(os.path.lexists(folder / name) for name in FILES)


def find_tokenizer(weights: Path) -> Path:
    """Find the tokenizer folder for a text encoder's file or folder. Raises WeightsError if there is none."""
    home = weights if weights.is_dir() else weights.parent
    tried = [home, home / "tokenizer", home / "google" / "umt5-xxl", home.parent / "tokenizer"]
    for folder in tried:
        if has_vocabulary(folder):
            return folder
        if folder.is_symlink():
            stat_path(folder, WeightsError)
    raise WeightsError(
        f"no tokenizer next to it (looked for {FILES[0]} in {', '.join(map(str, tried))})",
        where=weights,
        fix="set tokenizer_config.from_pretrained",
    )
