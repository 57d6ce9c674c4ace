"""The text encoder: transformers' UMT5EncoderModel and its tokenizer, loaded from any common file format."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import regular_file, stat_path
from mindspeed_mm.models.dialects import strip_prefix
from mindspeed_mm.models.foreign import foreign_model
from mindspeed_mm.models.loading import (
    NOT_BUILT,
    assign_weights,
    fingerprint,
    read_json,
    read_tensors,
    refuse_conflicts,
    shard_paths,
)
from mindspeed_mm.models.umt5.state_dict import (
    ARITHMETIC,
    UMT5_KEY_MAP,
    checked_settings,
    is_umt5,
    umt5_config,
)
from mindspeed_mm.models.umt5.tokenizer import Tokenizer, find_tokenizer

_TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
_AT_ONCE = 8  # batch size


class TextEncoder:
    """Encodes captions as token embeddings."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.text_dim = int(model.config.d_model)

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        device: torch.device = self.model.shared.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its weights and of the embeddings it returns."""
        dtype: torch.dtype = self.model.shared.weight.dtype
        return dtype

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights. Returns self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return one [L_i, text_dim] tensor for each prompt, on the model's device.

        L_i is the prompt's token count with </s> and without padding, at most text_len.
        """
        encoded: list[Tensor] = []
        for start in range(0, len(prompts), _AT_ONCE):
            ids, mask = self.tokenizer(prompts[start : start + _AT_ONCE])
            hidden = self.model(ids.to(self.device), mask.to(self.device)).last_hidden_state
            lengths = mask.sum(dim=1).tolist()
            encoded += [rows[:length].clone() for rows, length in zip(hidden, lengths, strict=True)]
        return tuple(encoded)


class LazyTextEncoder:
    """A text encoder that is moved to the device when it encodes its first caption."""

    def __init__(self, encoder: TextEncoder, device: torch.device) -> None:
        self._encoder, self._device, self._placed = encoder, device, False

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Encode like `TextEncoder.encode`."""
        if not self._placed:
            self._encoder.to(self._device)
            self._placed = True
        return self._encoder.encode(prompts)


def load_text_encoder(
    path: str | Path,
    tokenizer_path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    text_len: int = 512,
) -> TextEncoder:
    """Load the text encoder at `path`: official .pth, safetensors file, `text_encoder/` or model folder.

    ComfyUI files and all-in-one checkpoints also work. Without `tokenizer_path`, looks for the tokenizer next
    to the weights. Raises WeightsError if either is missing, damaged or from another model.
    """
    files, beside = _locate(Path(path))
    for file in files:
        regular_file(file, WeightsError)
    said = {} if beside is None else checked_settings(beside.values, beside.path)
    tokenizer = Tokenizer(Path(tokenizer_path) if tokenizer_path else find_tokenizer(files[0]), text_len)
    state = strip_prefix(
        read_tensors(files, "text encoder"), ("token_embedding.weight", "shared.weight", _TIED), path
    )
    if "token_embedding.weight" in state:
        state = {UMT5_KEY_MAP.to_theirs(name): weight for name, weight in state.items()}
    elif beside is None and not is_umt5(state):
        got = foreign_model(state) or "other names"
        raise WeightsError(
            f"got {got}", where=path, expected="the official UMT5 names or a config.json next to it"
        )
    shared = state.get("shared.weight", state.get(_TIED))
    if shared is None:
        got = foreign_model(state) or f"unknown weights ({', '.join(sorted(state)[:3])}, …)"
        raise WeightsError(
            f"got {got}",
            where=path,
            expected="a UMT5 encoder",
            fix="use models_t5_umt5-xxl-enc-bf16.pth or text_encoder/",
        )
    state |= {"shared.weight": shared, _TIED: shared}
    sizes = umt5_config(
        {UMT5_KEY_MAP.to_ours(name): tuple(w.shape) for name, w in state.items() if UMT5_KEY_MAP.knows(name)}
    )
    if beside is not None:
        refuse_conflicts(said, sizes, beside.path, files[0], ARITHMETIC)
    tokenizer.check_fits(shared.shape[0], files[0])
    model = _build(sizes, files[0])
    assign_weights(model, state, Path(path), dtype)
    model.encoder.set_input_embeddings(model.shared)
    mark = fingerprint(
        {name: weight for name, weight in state.items() if name != _TIED}, tokenizer.fingerprint
    )
    return TextEncoder(model.to(device), tokenizer, mark)


def count_weights(path: Path) -> int:
    """Return the encoder's number of parameters without reading values. Raises WeightsError."""
    found = read_tensors(_locate(path)[0], "text encoder")
    is_twice = any(name.endswith("shared.weight") for name in found)
    return sum(w.shape.numel() for name, w in found.items() if not (is_twice and name.endswith(_TIED)))


@dataclass(frozen=True)
class Beside:
    """A transformers config.json next to the weights."""

    path: Path
    values: dict[str, Any]


def _locate(path: Path) -> tuple[list[Path], Beside | None]:
    """Return the weight files, and the transformers config.json next to them."""
    if not stat.S_ISDIR(stat_path(path, WeightsError).st_mode):
        return [regular_file(path, WeightsError)], _config_in(path.parent)
    for folder in (path, path / "text_encoder"):
        if beside := _config_in(folder):
            if files := shard_paths(folder):
                return files, beside
            raise WeightsError(
                "contains a config.json but no weights", where=folder, fix="download the folder again"
            )
    official = sorted(
        file for file in path.iterdir() if "t5" in file.name.lower() and file.suffix in (".pth", ".pt")
    )
    if len(official) == 1:
        return official, None
    found = "none" if not official else ", ".join(file.name for file in official)
    raise WeightsError(
        f"got {found}",
        where=path,
        expected="one UMT5 encoder (models_t5_umt5-xxl-enc-bf16.pth, or text_encoder/)",
    )


def _config_in(folder: Path) -> Beside | None:
    config = folder / "config.json"
    values = read_json(config) if os.path.lexists(config) else {}
    return Beside(config, values) if values.get("model_type") == "umt5" else None


def _build(sizes: dict[str, Any], source: Path) -> UMT5EncoderModel:
    try:
        with torch.device("meta"):
            return UMT5EncoderModel(UMT5Config.from_dict({**sizes, **ARITHMETIC, "dropout_rate": 0.0}))
    except NOT_BUILT as error:
        raise WeightsError(
            f"no UMT5 encoder has these sizes: {sizes} ({type(error).__name__})", where=source
        ) from None
